"""The model around the memories: splits, generation, sampling, losses, errors that say why."""
from dataclasses import asdict, make_dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near

from cli import UsageError, UserError, read_args
from memory import RECURRENT
from model import MIXERS, Config, Hope, equal_model, read, sample, state_bytes, stream
from titans import DEEP


def tiny(mixer='gated_deltanet', **kwargs):
    torch.manual_seed(0)
    shape = {'n_layer': 2, 'n_embd': 16, 'n_head': 2, 'block_size': 24, 'tile': 8}
    return Hope(Config(mixer=mixer, **shape | kwargs))


def ids(B, T, V=257):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


MIXES = ['gated_deltanet,hope', 'hope,attention', 'titans,hope', 'lstm,hope']          # a memory per block


@pytest.mark.parametrize('mixer', [*MIXERS, *MIXES])
def test_whole_equals_split_and_init_state_is_none(mixer):
    model, idx = tiny(mixer).double(), ids(2, 61)
    whole, _, _ = model(idx)
    state, parts = model.init_state(2), []
    for part in idx.split([24, 1, 7, 29], dim=1):
        logits, _, state = model(part, state=state)
        parts.append(logits)
    assert_near('logits', torch.cat(parts, 1), whole, 1e-9)


@pytest.mark.parametrize('mixer', ['hope', 'titans', 'gated_deltanet', 'attention'])
def test_blocks_and_chunks_share_what_is_compiled(mixer):
    """torch.compile leaves what it had to compile eight times as it is: the blocks of a deep model would run slowly."""
    torch._dynamo.reset()
    model, idx = tiny(mixer, n_layer=3, memory_chunk=8), ids(2, 24)
    with torch._dynamo.config.patch(error_on_recompile=True):
        fast = torch.compile(model, backend='eager')
        for _ in range(2):
            loss = fast(idx, idx)[1]
            loss.backward()
    assert_near('loss', loss, model(idx, idx)[1], 1e-6)


def test_a_mixer_per_block():
    """The names are repeated over the depth; each block has the switches of its own memory; sizes can be made equal."""
    model = tiny('titans,hope', n_layer=4, adaptive='kv')
    assert model.config.mixers == ['titans', 'hope'] * 2
    assert [block.mixer.config.adaptive for block in model.blocks] == ['', 'kv'] * 2
    assert [block.mixer.config.dgd for block in model.blocks] == [False, True] * 2
    assert [block.mixer.config.memory_read for block in model.blocks] == ['after', 'before'] * 2
    assert tiny('titans', memory_read='before').blocks[0].mixer.config.memory_read == 'before'
    again = Hope(Config(**asdict(model.config)))                # as from a checkpoint
    again.load_state_dict(model.state_dict())
    assert Config(mixer='gated_deltanet+hope').mixer == 'gated_deltanet,hope'
    knobs = {'n_layer': 4, 'n_embd': 32, 'n_head': 2}
    sizes = [equal_model(mixer, knobs, 60_000).num_params() for mixer in ('hope', *MIXES)]
    assert max(abs(size - 60_000) for size in sizes) <= 3 * 32 * 4 / 2
    for mixer, why in (('hope,hope,hope', 'cannot be repeated over --n_layer=4'), ('hope,', "not ''"),
                       ('hope,gla', 'is now --mixer=mamba2'), ('titans,gated_deltanet', '--adaptive=k is for')):
        with pytest.raises(ValueError, match=why):
            Config(mixer=mixer, adaptive='k', **knobs)


def test_loss_is_nats_per_token_and_skips_minus_one():
    model, idx = tiny(), ids(2, 10)
    targets = idx.roll(-1, 1)
    targets[:, 6:] = -1
    logits, loss, _ = model(idx, targets)
    assert_near('loss', loss, F.cross_entropy(logits[:, :6].flatten(0, 1), targets[:, :6].flatten()), 1e-6)
    assert abs(loss.item() - 5.55) < 0.1, 'an untrained model should be close to log(257)'


@pytest.mark.parametrize('mixer', ['gated_deltanet', 'ttt', 'attention', 'lstm', *MIXES])
def test_cached_generation_equals_recomputing_everything(mixer):
    model, idx = tiny(mixer, block_size=64).double(), ids(2, 9)
    got = model.generate(idx, 20, temperature=0)
    for _ in range(20):
        idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, idx)


def test_generation_depends_on_its_generator_alone():
    model, idx = tiny(), ids(1, 5)
    runs = []
    for other in (1, 2):
        torch.manual_seed(other)
        runs.append(model.generate(idx, 30, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], model.generate(idx, 30, generator=torch.Generator().manual_seed(8)))


def test_stop_token_ends_a_row_and_then_the_batch():
    model, idx = tiny(), ids(3, 4)
    free = model.generate(idx, 200, generator=torch.Generator().manual_seed(0))
    stop = free[0, 10].item()
    out = model.generate(idx, 200, stop_token=stop, generator=torch.Generator().manual_seed(0))
    first = (out[0, 4:] == stop).nonzero()[0].item()
    assert (out[0, 4 + first:] == stop).all()
    assert out.shape[1] < 204, 'every row has stopped by then'
    assert (out[:, -1] == stop).all()


def test_sampling_cuts():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = logits.softmax(-1)[0]
    rng = torch.Generator().manual_seed(0)
    def drawn(**kwargs): return torch.cat([sample(logits, generator=rng, **kwargs) for _ in range(3000)])
    assert (drawn(temperature=0) == 0).all() and (drawn(temperature=1e-40) == 0).all()
    counts = drawn().bincount(minlength=4) / 3000
    assert (counts - p).abs().max() < 0.04
    assert set(drawn(top_k=2).tolist()) == {0, 1}
    assert set(drawn(top_p=0.7).tolist()) == {0, 1}, 'the most likely alone has 0.64 < 0.7, two have 0.88'
    assert set(drawn(top_p=0.6).tolist()) == {0}
    assert set(drawn(top_k=100).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize('mixer', [*RECURRENT, 'lstm'])
def test_recurrent_state_is_constant(mixer):
    model = tiny(mixer)
    sizes = [state_bytes(read(model, ids(1, T))[1]) for T in (1, 30, 500)]
    assert len(set(sizes)) == 1 and sizes[0] > 0


def test_attention_state_stops_at_the_block_size():
    model = tiny('attention')
    sizes = [state_bytes(read(model, ids(1, T))[1]) for T in (1, 23, 24, 500)]
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


def test_logits_stay_finite_after_many_tokens():
    for mixer in RECURRENT:
        model = tiny(mixer, n_layer=1, block_size=10_000, tile=64)
        logits, state = read(model, ids(1, 100_000))
        assert torch.isfinite(logits).all() and all(torch.isfinite(layer['S']).all() for layer in state), mixer


def test_bf16_autocast_is_close():
    for mixer in MIXERS:
        model, idx = tiny(mixer), ids(2, 40)
        want, _, _ = model(idx)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            got, loss, state = model(idx, idx)
        loss.backward()
        assert got.dtype == torch.float32 and loss.dtype == torch.float32
        assert_near(mixer, got, want, 6e-2)


def test_tied_head():
    model = tiny(tie_head=True)
    assert model.head.weight is model.embed.weight
    assert tiny().num_params() - model.num_params() == 257 * 16
    assert tiny().flops_per_token(24) == model.flops_per_token(24)


def test_flops_count_every_matrix_once():
    model = tiny('linear', n_layer=1)
    not_products = model.embed.weight.numel() + model.blocks[0].mixer.conv.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - not_products
    beyond = model.flops_per_token(24) / 3 - 2 * matrices
    assert 0 < beyond < 0.5 * 2 * matrices


def test_reading_asks_the_device_for_nothing(monkeypatch):
    """Ids are checked once by whoever has them; asked for at every token, a GPU would wait for its own answers."""
    model, idx = tiny(), ids(1, 5)
    with monkeypatch.context() as patch:
        for name in ('min', 'max', 'item', 'tolist'):
            patch.setattr(torch.Tensor, name, lambda *args: pytest.fail('the device is asked'))
        tokens = [token for token, _ in stream(model, idx, 3, temperature=0)]
    assert torch.equal(torch.stack(tokens, dim=1), model.generate(idx, 3, temperature=0)[:, 5:])


def test_prompt_errors():
    model = tiny()
    with pytest.raises(UserError, match='token id 300 is outside the vocabulary of 257'):
        model.generate(torch.tensor([[1, 300]]), 5)
    with pytest.raises(UserError, match='token id -1 '):
        model.generate(torch.tensor([[-1, 3]]), 5)
    with pytest.raises(UserError, match='empty'):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 5)


@pytest.mark.parametrize('kwargs, named', [({'mixer': 'mamba'}, 'mixer'), ({'n_embd': 30, 'n_head': 4}, 'n_embd'),
                                           ({'n_layer': 0}, 'n_layer'), ({'tile': 0}, 'tile')])
def test_config_refuses(kwargs, named):
    with pytest.raises(ValueError, match=named):
        Config(**kwargs)


def test_former_names_are_refused_with_a_hint():
    with pytest.raises(ValueError, match='--mixer=gla is now --mixer=mamba2'):
        Config(mixer='gla')
    for word, hint in (('--chunk_size=8', 'is now --tile'), ('--form=full', '--data=niah:full'),
                       ('--cms_inner=gd', 'is gone')):
        with pytest.raises(UsageError, match=hint):
            read_args([Config, make_dataclass('Run', [('data', str, 'python')])], [word])
    with pytest.raises(UsageError, match='unknown option --form'):      # of no use where nothing takes its place
        read_args([Config], ['--form=full'])


@pytest.mark.parametrize('mixer', ['hope', 'titans', 'gated_deltanet', 'attention'])
def test_initial_values(mixer):
    """The sizes that the docstrings promise; and nobody starts as what the memory happened to hold."""
    model = Hope(Config(mixer=mixer, n_layer=8, n_embd=128, n_head=4))
    block, layer, branches = model.blocks[3].cms.levels[0], model.blocks[3].mixer, 16
    for p, std in ((layer.qkv.weight, 128 ** -0.5), (layer.out.weight, (128 * branches) ** -0.5),
                   (block.up.weight, 128 ** -0.5), (block.out.weight, (block.out.in_features * branches) ** -0.5),
                   (model.embed.weight, 1), (model.head.weight, 1 / 128)):
        assert abs(p.std().item() / std - 1) < 0.05 and abs(p.mean().item()) < 0.05 * std
    if mixer != 'attention':
        taps = layer.conv.view(4, 3, 128).mean(-1)                  # of q and v the token's own, of k the one before
        for i, own in enumerate((3, 2, 3)):
            assert abs(taps[own, i] - 1) < 0.1 and (taps[:, i].abs() < 0.1).sum() == 3
        assert abs(layer.conv[0].std() / 0.3 - 1) < 0.2 and torch.equal(layer.conv[1:, :128], layer.conv[:-1, 128:256])
        tokens = 1 / (1 - torch.sigmoid(layer.alpha.bias))
        assert torch.allclose(tokens, torch.logspace(5, 10, 4, base=2), rtol=1e-3) and not layer.alpha.weight.any()
        assert not layer.beta.weight.any() and not layer.beta.bias.any()
    if mixer in DEEP:
        assert not layer.out_0.any() and abs(layer.W2_0.std() - 1) < 0.05, 'nothing is answered before it was written'
        assert set(layer.beta_shift.flatten().tolist()) <= {-3.0, 0.0, -8.0}
        assert mixer == 'titans' or not layer.gates_0.any() and (layer.blend == 0.1).all()


@pytest.mark.parametrize('mixer, adaptive, shift, shifts', [
    ('hope', 'kvg', 3.0, [3, 0, 3, 3]), ('hope', 'kvg', -5.0, [-3, 0, -5, -5]), ('hope', 'g', 3.0, [3, 0]),
    ('hope', '', 3.0, [3, 0]), ('hope_light', 'g', 3.0, [0, 3]), ('hope_light', 'g', -5.0, [0, -3])])
def test_how_fast_what_generates_is_written_at_first(mixer, adaptive, shift, shifts):
    layer = Hope(Config(mixer=mixer, adaptive=adaptive, generate_shift=shift)).blocks[0].mixer
    assert layer.beta_shift[0].tolist() == shifts


def test_a_parameter_that_nobody_starts_is_noticed(monkeypatch):
    monkeypatch.setattr('attention.Attention.init_weights', lambda self, branches: None)
    with pytest.raises(AssertionError, match='nobody says how blocks.0.mixer.qkv.weight starts'):
        tiny('attention')
