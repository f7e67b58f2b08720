"""Attention and its cache: the sum written out, whole == split, states that are values although they share a buffer."""
import copy
import io

import pytest
import torch
from conftest import assert_near

from attention import Attention
from model import Config

WINDOW = 20


def layer_and_input(T=45, B=2, block_size=WINDOW, seed=0):
    torch.manual_seed(seed)
    layer = Attention(Config(mixer='attention', n_embd=16, n_head=2, block_size=block_size)).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer, torch.randn(B, T, 16, dtype=torch.float64)


def read(layer, x, sizes, state=None):
    """Outputs and last state of x, given in parts of these sizes."""
    parts = []
    for part in x.split(sizes, dim=1):
        y, state = layer(part, state)
        parts.append(y)
    return torch.cat(parts, dim=1), state


def test_softmax_over_a_window():
    """Against the sum written out, positions counted from the first token, block_size tokens seen."""
    layer, x = layer_and_input(T=30, block_size=12)
    y, _ = layer(x)
    B, T, D = x.shape
    q, k, v = layer.qkv(x).view(B, T, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = layer.q_norm(q), layer.k_norm(k)
    frequency = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.exp(1j * torch.arange(T)[:, None] * frequency)                             # (T, Dk/2)
    q, k = (torch.complex(z[..., :4], z[..., 4:]) * turn for z in (q, k))
    want = torch.zeros_like(v)
    for t in range(T):
        first = max(0, t - 11)
        scores = (q[:, :, t, None] * k[:, :, first:t + 1].conj()).real.sum(-1) / 8 ** 0.5
        want[:, :, t] = (scores.softmax(-1)[..., None] * v[:, :, first:t + 1]).sum(2)
    assert_near('y', y, layer.out(want.transpose(1, 2).reshape(B, T, D)), 1e-12)


@pytest.mark.parametrize('block_size', [1, WINDOW, 100])
@pytest.mark.parametrize('gradients', [True, False])
def test_whole_equals_split(gradients, block_size):
    layer, x = layer_and_input(block_size=block_size)
    want, last = layer(x)
    with torch.set_grad_enabled(gradients):
        for sizes in (1, [5, 20, 1, 19], [16, 16, 13], [3, 42], [40, 1, 1, 1, 1, 1]):
            y, state = read(layer, x, sizes)
            assert_near('y', y, want, 1e-12)
            assert state['position'].tolist() == last['position'].tolist() == [45, 45]
            assert state['kv'].shape == last['kv'].shape and state['kv'].shape[3] == min(45, block_size - 1)
            if block_size > 1:
                assert_near('kv', state['kv'], last['kv'], 1e-12)


@pytest.mark.parametrize('sizes', [45, 1, [16, 16, 13]])
def test_causality_and_streams_apart(sizes):
    """Changing token 23 of one stream leaves all before it and the other stream untouched."""
    layer, x = layer_and_input()
    with torch.no_grad():
        y = read(layer, x, sizes)[0]
        x[0, 23] += 1
        changed = read(layer, x, sizes)[0]
    assert torch.equal(changed[0, :23], y[0, :23]) and torch.equal(changed[1], y[1])
    assert not torch.equal(changed[0, 23], y[0, 23])


@torch.no_grad()
@pytest.mark.parametrize('before', [10, 12, 30])
def test_two_continuations_of_one_state_do_not_meet(before):
    """Turn by turn, as beams would: the second to write behind the shared pairs must not write over the first."""
    layer, x = layer_and_input()
    states = 2 * [read(layer, x[:, :before], 1)[1]]
    texts = [x[:, before:], layer_and_input(seed=1)[1][:, before:]]
    written = [[], []]
    for t in range(45 - before):
        for i in (0, 1):
            y, states[i] = layer(texts[i][:, t:t + 1], states[i])
            written[i].append(y)
    for text, parts in zip(texts, written):
        want = layer(torch.cat([x[:, :before], text], dim=1))[0][:, before:]
        assert_near('y', torch.cat(parts, dim=1), want, 1e-12)


def saved(state):
    file = io.BytesIO()
    torch.save({name: x.clone() if torch.is_tensor(x) else x for name, x in state.items()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def rows(f):
    """f of every tensor of a state."""
    return lambda state: {name: f(x) if torch.is_tensor(x) else x for name, x in state.items()}


@torch.no_grad()
@pytest.mark.parametrize('name, change, pick', [
    ('row', rows(lambda x: x[1:]), [1]), ('swapped', rows(lambda x: x[[1, 0]]), [1, 0]), ('saved', saved, [0, 1]),
    ('expanded', rows(lambda x: x[:1].expand(3, *x.shape[1:])), [0, 0, 0]), ('copied', copy.deepcopy, [0, 1]),
    ('joined', rows(lambda x: torch.cat([x, x[:1]])), [0, 1, 0]), ('detached', rows(torch.detach), [0, 1])])
@pytest.mark.parametrize('before', [10, 12, 30])
def test_changed_states_are_read_on_from(name, change, pick, before):
    """By token and in parts, while another reads on from the state that they were made of."""
    layer, x = layer_and_input()
    _, state = read(layer, x[:, :before], 1)
    changed = change(state)
    more = torch.randn(len(pick), 15, 16, dtype=torch.float64)
    want = layer(torch.cat([x[pick, :before], more], dim=1))[0][:, before:]
    for sizes in (1, [4, 1, 10]):
        assert_near(name, read(layer, more, sizes, changed)[0], want, 1e-12)
        layer(x[:, before:before + 1], state)
    assert_near('the state itself', read(layer, x[:, before:], 1, state)[0], layer(x)[0][:, before:], 1e-12)


def test_gradients_of_what_a_buffer_holds():
    """Reading on with gradients from a state without, then without again: what autograd has saved is not written to."""
    layer, x = layer_and_input()
    with torch.no_grad():
        _, state = read(layer, x[:, :10], 1)
    x = x.requires_grad_()
    y, after = layer(x[:, 10:13], state)
    with torch.no_grad():
        read(layer, x[:, 10:], 1, state)
        read(layer, x[:, 13:], 1, after)
    gradient, = torch.autograd.grad(y.sum(), x)
    want, = torch.autograd.grad(layer(torch.cat([x[:, :10].detach(), x[:, 10:13]], dim=1))[0][:, 10:].sum(), x)
    assert_near('gradient', gradient, want, 1e-12)


@pytest.mark.parametrize('modes', [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode),
                                   (torch.inference_mode, torch.enable_grad)])
def test_inference_mode(modes):
    """torch refuses to write into its tensors outside of it."""
    layer, x = layer_and_input()
    with modes[0]():
        before, state = read(layer, x[:, :12], 1)
    with modes[1]():
        after, _ = read(layer, x[:, 12:], 1, state)
    assert_near('y', torch.cat([before, after.detach()], dim=1), layer(x)[0], 1e-12)


@torch.no_grad()
def test_a_token_does_not_copy_what_was_read():
    """Buffers double, so few are made; at the window's end a new one every WINDOW tokens."""
    layer, x = layer_and_input(T=200, block_size=1000)
    buffers, state = set(), None
    for t in range(200):
        state = layer(x[:, t:t + 1], state)[1]
        buffers.add(state['kv'].untyped_storage().data_ptr())
    assert len(buffers) <= 9, f'{len(buffers)} buffers for 200 tokens'
    layer, _ = layer_and_input()
    moves, last, largest = 0, None, 0
    for t in range(200):
        state = layer(x[:, t:t + 1], state if t else None)[1]
        storage = state['kv'].untyped_storage()
        moves, last, largest = moves + (storage.data_ptr() != last), storage.data_ptr(), max(largest, storage.nbytes())
    token = 2 * 2 * 16 * 8                                          # bytes: two rows, a key and a value
    assert moves <= 5 + 200 / WINDOW and largest <= 2 * WINDOW * token, 'no buffer is longer than two windows'
    for part in x.split(WINDOW, dim=1):
        state = layer(part, state)[1]
        assert state['kv'].untyped_storage().nbytes() <= 2 * WINDOW * token, 'nor where a window is read at a time'


@torch.no_grad()
def test_mixed_precision():
    """Under autocast keys and values are kept as values are, in bfloat16; a cache from before in float32 joins them."""
    layer, x = layer_and_input()
    layer, x = layer.float(), x.float()
    want = layer(x)[0]
    _, before = layer(x[:, :10])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y, state = read(layer, x[:, 10:], [1] * 35, before)
    assert state['kv'].dtype == torch.bfloat16
    assert_near('y', y.float(), want[:, 10:], 3e-2)


def test_a_position_far_out_loses_nothing():
    """Only differences matter: after 10^7 tokens as after none, in float32, and streams may be at positions apart."""
    layer, x = layer_and_input()
    layer, x = layer.float(), x.float()
    far = layer.init_state(2) | {'position': torch.tensor([10 ** 7, 3])}
    y, state = read(layer, x, [7, 1, 37], far)
    assert_near('y', y, layer(x)[0], 1e-5)
    assert state['position'].tolist() == [10 ** 7 + 45, 48]


def test_half_precision_and_back():
    layer, x = layer_and_input()
    layer, x = layer.float(), x.float()
    want = layer(x)[0]
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            y, state = read(layer, x[:, :20], [10, 10])
            with torch.autocast('cpu', torch.bfloat16):
                half, state = read(layer, x[:, 20:30], [1, 9], state)
            again, _ = read(layer, x[:, 30:], [1, 14], state)
        assert_near('y', torch.cat([y, half.float(), again], dim=1), want, 3e-2)
