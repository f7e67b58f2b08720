"""The LSTM: its paper's formula, what its state is. What every memory does is in test_memory.py and test_model.py."""
import pytest
import torch
from conftest import assert_near
from test_memory import layer_and_input
from test_model import tiny

from carry import join_rows, take_rows
from optim import param_groups


def test_formula_of_its_paper():
    """With the forget gate of Gers 2000; torch keeps two biases, which are added."""
    layer, x = layer_and_input('lstm')
    W, R, b = layer.lstm.weight_ih_l0, layer.lstm.weight_hh_l0, layer.lstm.bias_ih_l0 + layer.lstm.bias_hh_l0
    h = c = torch.zeros(2, 16, dtype=torch.float64)
    want = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ W.mT + h @ R.mT + b).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        want.append(layer.out(h))
    y, state = layer(x)
    assert_near('y', y, torch.stack(want, dim=1), 1e-12)
    assert_near('h', state['h'], h, 1e-12)
    assert_near('c', state['c'], c, 1e-12)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
def test_a_state_is_a_value(mode):
    """It is read on from twice, in rows, expanded; and nobody changes it."""
    layer, x = layer_and_input('lstm')
    with mode():
        _, state = layer(x[:, :20])
        kept = {name: value.clone() for name, value in state.items()}
        want = layer(x)[0][:, 20:]
        for rows in ([0, 1], [1], [1, 0], [0, 0, 1]):
            part = {name: value[rows] for name, value in state.items()}
            assert_near('rows', layer(x[rows, 20:], part)[0], want[rows], 1e-12)
        expanded = {name: value[:1].expand(3, -1) for name, value in state.items()}
        assert_near('expanded', layer(x[[0, 0, 0], 20:], expanded)[0], want[[0, 0, 0]], 1e-12)
    assert all(torch.equal(kept[name], state[name]) for name in 'hc')


def test_a_mixed_model_carries_its_state_in_parts():
    """--carry: the state of each row, taken apart and joined, goes on as the whole does."""
    model, idx = tiny('lstm,hope').double(), torch.randint(257, (3, 40), generator=torch.Generator().manual_seed(0))
    whole = model(idx)[0][:, 24:]
    state = join_rows([model(rows[:, :24])[2] for rows in idx.split([1, 2])])
    got = torch.cat([model(idx[i:i + 1, 24:], state=take_rows(state, [i], 'cpu'))[0] for i in range(3)])
    assert_near('logits', got, whole, 1e-9)


def test_initial_values_and_groups():
    model = tiny('lstm', n_embd=128, n_layer=4)
    layer = model.blocks[2].mixer
    for p, std in ((layer.lstm.weight_ih_l0, 128 ** -0.5), (layer.lstm.weight_hh_l0, 128 ** -0.5),
                   (layer.out.weight, (128 * 8) ** -0.5)):
        assert abs(p.std().item() / std - 1) < 0.05
    biases = (layer.lstm.bias_ih_l0 + layer.lstm.bias_hh_l0).view(4, 128)
    assert biases.sum(1).tolist() == [0, 128, 0, 0], 'the forget gate begins open'
    matrices = {id(p) for p in param_groups(model, 0.1, 1.0)[0]['params']}
    assert {id(layer.lstm.weight_ih_l0), id(layer.lstm.weight_hh_l0), id(layer.out.weight)} <= matrices
    assert id(layer.lstm.bias_ih_l0) not in matrices
