"""Hope's memory made light: the fast form against the equations token by token (light_ref), for every switch."""
import pytest
import torch
from conftest import assert_near, difference
from test_titans import output_and_gradients, slow

from light import light_ref
from machine import compiled
from model import Config, Hope


def light_layer(**kwargs):
    torch.manual_seed(0)
    small = {'n_layer': 1, 'n_embd': 12, 'n_head': 2, 'block_size': 64, 'memory_hidden': 5, 'memory_chunk': 4,
             'tile': 3}
    layer = Hope(Config(mixer='hope_light', **small | kwargs)).double().blocks[0].mixer
    with torch.no_grad():                       # away from the neutral start, so that everything has an effect
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer, torch.randn(2, 23, 12, dtype=torch.float64)


@pytest.mark.parametrize('switch', [{}, {'adaptive': ''}, {'memory_read': 'after'}, {'negative_eigenvalues': True},
                                    {'gate_floor': 0.45}, {'gate_gain': 8.0}, {'memory_chunk': 1},
                                    {'projection_chunk': 8}], ids=str)
def test_fast_form_equals_token_loop(switch):
    """Outputs, and the gradients of the input and of every parameter, of two sequences."""
    layer, x = light_layer(**switch)
    wrt = [x.requires_grad_(), *layer.parameters()]
    names = ['x', *(name for name, _ in layer.named_parameters())]
    fast, slow = layer(x)[0], torch.stack([light_ref(layer, row) for row in x])
    assert_near('y', fast, slow, 1e-12)
    weight = torch.linspace(-1, 1, fast.numel(), dtype=fast.dtype).view_as(fast)
    for name, *both in zip(names, *(torch.autograd.grad((y * weight).sum(), wrt) for y in (fast, slow))):
        assert both[0].abs().max() > 0, name
        assert_near(name, *both, 1e-10)


def test_gradients_reach_a_state_that_is_given():
    layer, x = light_layer()
    state = layer(x)[1]
    state = {name: s.detach().requires_grad_() if torch.is_tensor(s) else s for name, s in state.items()}
    grads = torch.autograd.grad(layer(x, state)[0].square().sum(), [state[name] for name in ('S', 'R', 'R_xi', 'conv')])
    assert all(grad.abs().max() > 0 for grad in grads)


def test_each_token_moves_the_gates_of_later_chunks_alone():
    layer, x = light_layer()
    q, k, v = torch.randn(3, 1, 2, 12, 6, dtype=torch.float64)
    gates = torch.randn(2, 1, 2, 12, dtype=torch.float64)
    v.requires_grad_()
    alpha, beta, _ = layer.generate_gates(k, v, *gates, layer.init_state(1), k.dtype)
    for t in range(12):
        moved = torch.autograd.grad(alpha[0, 0, t] + beta[0, 0, t], v, retain_graph=True, allow_unused=True)[0]
        reach = 0 if moved is None else (moved[0, 0].abs().sum(-1) > 0).sum().item()
        assert reach == t // 4 * 4, f'token {t} is moved by {reach}'


@pytest.mark.parametrize('switch', [{'adaptive': 'kvg'}, {'memory_read': 'start'}, {'dgd': False}, {'forget': False},
                                    {'memory_momentum': True}, {'objective': 'l2'}], ids=str)
def test_what_only_hope_has_is_refused(switch):
    with pytest.raises(ValueError, match='--mixer=hope'):
        Config(mixer='hope_light', **switch)
    both = Hope(Config(mixer='hope,hope_light', n_embd=16, n_head=2, block_size=128, **switch))     # hope has it there
    assert both(torch.arange(9)[None])[0].isfinite().all()


def test_bfloat16_autocast_keeps_the_memory_in_float32():
    torch.manual_seed(0)
    model, idx = Hope(Config(mixer='hope_light', n_layer=1, n_embd=32, n_head=2, block_size=64)), torch.arange(64)[None]
    with torch.autocast('cpu', torch.bfloat16):
        _, loss, state = model(idx, idx)
        loss.backward()
    assert {s.dtype for s in state[0].values() if torch.is_tensor(s)} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert abs(loss.item() - model(idx, idx)[1].item()) < 0.05


@slow
@pytest.mark.parametrize('mixer', ['hope_light', 'gated_deltanet'])
def test_compiled_in_bfloat16_is_as_near_to_float32_as_eager(mixer):
    """Its products are of bfloat16, forward and backward."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = Hope(Config(mixer=mixer, n_layer=1, n_embd=32, n_head=2, block_size=64, memory_chunk=16)).blocks[0].mixer
    x = torch.randn(2, 64, 32, requires_grad=True)
    want, *results = (output_and_gradients(f, layer, x, autocast)
                      for f, autocast in ((layer, False), (layer, True), (compiled(layer), True)))
    (_, *eager), (output, *fast) = ([*map(difference, result, want)] for result in results)
    assert 1e-4 < output < 2e-2, f'the output is {output:.1e} away from float32'
    assert max(fast) < 1.5 * max(eager), f'gradients are {max(fast):.1e} away, eager ones {max(eager):.1e}'


def test_many_chunks_are_read_as_few():
    """Above UNROLLED chunks torch.compile gets them one by one: the same numbers, uncompiled too."""
    layer, _ = light_layer(memory_chunk=1)
    x = torch.randn(1, 40, 12, dtype=torch.float64)
    first, state = layer(x[:, :10])
    assert_near('y', torch.cat([first, layer(x[:, 10:], state)[0]], dim=1), layer(x)[0], 1e-12)
