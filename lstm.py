"""
The LSTM (Hochreiter & Schmidhuber 1997), torch's: the memory that is no matrix but one number a unit, and that sees
what it read before at every step, so that no two tokens can be computed side by side. It counts and it flips, which is
why races have it as the reference (race.py).

    y, state = LSTM(config)(x, state)           x, y (B, T, D); the state holds the last hidden and cell state

Does NOT include: heads, several layers in one block, peepholes.

Glossary: B batch, T time, D model width and units
"""
import torch
import torch.nn as nn

from kernels import at_least_float32


class LSTM(nn.Module):
    """
    One LSTM as wide as the model, and a projection, as every residual branch ends in one.

    state   h, c (B, D), what it said and what it keeps after the last token
    """
    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.lstm = nn.LSTM(D, D, batch_first=True)
        self.out = nn.Linear(D, D, bias=False)

    def init_weights(self, branches):
        """
        weights         normal, std 1 / sqrt(D); out: 1 / sqrt(D branches), as all that a residual branch ends in
        biases          0; 1 in the forget gate, which begins by keeping three quarters
        """
        D = self.out.in_features
        self.lstm.weight_ih_l0.normal_(std=D ** -0.5)
        self.lstm.weight_hh_l0.normal_(std=D ** -0.5)
        self.lstm.bias_ih_l0.zero_()
        self.lstm.bias_ih_l0[D:2 * D] = 1                                   # torch's order: input, forget, cell, output
        self.lstm.bias_hh_l0.zero_()
        self.out.weight.normal_(std=(D * branches) ** -0.5)

    def init_state(self, batch_size, device=None):
        """Zeros."""
        return {name: torch.zeros(batch_size, self.out.in_features, device=device) for name in 'hc'}

    def forward(self, x, state=None):
        state = state or self.init_state(len(x), x.device)
        with torch.autocast(x.device.type, enabled=False):                  # what is added up for long is float32
            x = at_least_float32(x)
            h, c = (state[name].to(x.dtype)[None].contiguous() for name in 'hc')        # (B, D) -> (1, B, D)
            y, (h, c) = self.lstm(x, (h, c))                                # (B, T, D)
        return self.out(y), {'h': h[0], 'c': c[0]}

    def flops(self, T):
        """Forward FLOPs per token beyond the weights: none are products."""
        return 0
