"""
From tile to tile: the part of kernels.delta_rule that has to wait, and how to wait less.

    starts, n, S = Scan.apply(S, write, A, X, k_erase, k_end, keep, G)
    python scan.py              the same tiles in one chain and in groups: numbers, seconds

Does NOT include: what happens inside a tile, and momentum (kernels.py).

Glossary (kernels.delta_rule has the mathematics)
    here        shape               meaning
    S           (B, H, Dv, Dk)      the memory
    write       (B, H, N, C, Dv)    what a tile's tokens would write if the memory were empty
    A, X        (B, H, N, C, C)     how tokens of a tile erase each other's; the inverse of I + A
    k_erase     (B, H, N, C, Dk)    keys, by how much of the tile's start each erases
    k_end       (B, H, N, C, Dk)    keys, by how much of each is left at the tile's end
    keep        (B, H, N, 1, 1)     how much of its start is left at a tile's end
    n           (B, H, N, C, Dv)    what the tokens really write
    B batch, H heads, N tiles, G groups of them, C tokens in a tile, Dk key width, Dv value width
"""
import torch
import torch.nn.functional as F


class Scan(torch.autograd.Function):
    """
    With S_0 = S, for tile i of N:
        n_i = X_i (write_i - k_erase_i S_i^T),  S_{i+1} = keep_i S_i + n_i^T k_end_i
    (k_erase may start with tile 1: then what tile 0 erases has been taken from its write)
    returns all S_i but the last (B, H, N, Dv, Dk), all n_i (B, H, N, C, Dv), and the last S (B, H, Dv, Dk)
    S, A and keep are float32 or better, and so are sums over tiles; all others, and products, are of write's type.

    Its own backward, because only three products per tile need the gradient of what comes after; the others are one
    product for all tiles, where autograd makes two of each, tile by tile, and stacks them. And the gradient of A is
    -dr n^T; by way of its inverse X it would be three products. So X gets none.

    Where N is large, G groups of tiles go side by side (B, H, G, N / G, ..), or the chain, and the code compiled for
    it, would be as long as the sequence. A group takes every row of S to the same linear map of it: S -> S M + U, U
    what it makes of zeros, M of a unit matrix. So each group's start follows from the one before, and all run from
    theirs. The backward does the same with M^T. Second derivatives are those of one group alone.
    """
    @staticmethod
    def forward(ctx, S, write, A, X, k_erase, k_end, keep, G):
        parts = in_groups(G, write, X, k_erase, k_end, keep)
        S, M, (Dv, Dk) = S.unsqueeze(-3), None, S.shape[-2:]
        if G > 1:
            rows = F.pad(torch.eye(Dk, dtype=S.dtype, device=S.device), (0, 0, Dv, 0))      # Dv rows of zeros, a unit
            ends = scan(rows.expand(*S.shape[:-3], G, -1, -1), F.pad(parts[0], (0, Dk)), *parts[1:])[2]
            U, M = ends.split([Dv, Dk], dim=-2)                             # (B, H, G, Dv, Dk), (B, H, G, Dk, Dk)
            S = chain(S, M, U)
        starts, n, ends = scan(S, *parts)
        starts, n = starts.flatten(-4, -3), n.flatten(-4, -3)
        ctx.save_for_backward(starts, n, X, k_erase, k_end, keep, M)
        return starts, n, ends[..., -1, :, :]

    @staticmethod
    def backward(ctx, d_starts, dn, dS):
        starts, n, X, k_erase, k_end, keep, M = ctx.saved_tensors
        G = 1 if M is None else M.shape[-3]
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        assert G == 1 or not twice, 'groups of tiles have no second derivatives: use a larger tile'
        parts = in_groups(G, d_starts, dn, X, k_erase, k_end, keep)
        dS = dS.unsqueeze(-3)
        if G > 1:
            d_U = scan_back(torch.zeros_like(dS).expand(*dS.shape[:-3], G, -1, -1), *parts)[2]
            dS = chain(dS, M.mT.flip(-3), d_U.flip(-3)).flip(-3)
        dr, d_ends, dS = scan_back(dS, *parts)
        dr, d_ends = dr.flatten(-4, -3), d_ends.flatten(-4, -3)
        done = 0 if X is None else X.shape[-3] - k_erase.shape[-3]
        place = torch.arange(n.shape[-2], device=n.device, dtype=dS.dtype)  # floats: tril would compare long integers
        dA = None if X is None else torch.where(place[:, None] > place, -(dr @ n.mT), 0)    # (C, Dv) x (Dv, C)
        dk_erase = None if X is None else -dr[..., done:, :, :] @ starts[..., done:, :, :]      # (.., C, Dv) x (Dv, Dk)
        d_keep = None if keep is None else (d_ends * starts).sum((-2, -1), keepdim=True, dtype=keep.dtype)
        return dS[..., 0, :, :], dr, dA, None, dk_erase, n @ d_ends, d_keep, None


def in_groups(G, *parts):
    """(B, H, N, ..) -> (B, H, G, N / G, ..); a part that has no first tile (k_erase) goes with one group alone."""
    return [None if x is None else x.unflatten(-3, (G, -1)) for x in parts]


def scan(S, write, X, k_erase, k_end, keep):
    """Scan's loop over the tiles of each group, S (B, H, G, Dv, Dk) -> all S_i, all n_i, the last S, of each group."""
    w, x, k, end, kept = (None if t is None else t.unbind(-3) for t in (write, X, k_erase, k_end, keep))
    starts, n, done = [], [], 0 if X is None else len(w) - len(k)           # done: how many have erased already
    for i in range(len(w)):
        starts.append(S.to(write.dtype))
        r = w[i] if X is None or i < done else w[i] - k[i - done] @ starts[i].mT        # (.., C, Dk) x (.., Dk, Dv)
        n.append(r if X is None else x[i] @ r)                              # (.., C, C) x (.., C, Dv) -> (.., C, Dv)
        S = n[i].mT @ end[i] + (S if keep is None else kept[i] * S)         # (.., Dv, C) x (.., C, Dk) -> (.., Dv, Dk)
    return torch.stack(starts, dim=-3), torch.stack(n, dim=-3), S


def scan_back(dS, d_starts, dn, X, k_erase, k_end, keep):
    """dS of each group's end -> the gradients of r_i, what X_i is multiplied with, of all S_i+1, and of the first S."""
    x, k, end, kept = (None if t is None else t.unbind(-3) for t in (X, k_erase, k_end, keep))
    dr, d_ends, done = [], [], 0 if X is None else len(x) - len(k)
    for i in reversed(range(dn.shape[-3])):
        d_ends.insert(0, dS.to(dn.dtype))
        d = dn.select(-3, i) + end[i] @ d_ends[0].mT                        # (.., C, Dk) x (.., Dk, Dv) -> (.., C, Dv)
        dr.insert(0, d if X is None else x[i].mT @ d)                       # (.., C, C) x (.., C, Dv) -> (.., C, Dv)
        dS = d_starts.select(-3, i) + (dS if keep is None else kept[i] * dS)
        if X is not None and i >= done:
            dS = dS - dr[0].mT @ k[i - done]                                # (.., Dv, C) x (.., C, Dk) -> (.., Dv, Dk)
    return torch.stack(dr, dim=-3), torch.stack(d_ends, dim=-3), dS


def chain(S, M, U):
    """S_{g+1} = S_g M_g + U_g from S_0 = S (B, H, 1, Dv, Dk) -> S_0 to S_{G-1} (B, H, G, Dv, Dk); float32 or better."""
    starts = [S.squeeze(-3)]
    with torch.autocast(S.device.type, enabled=False):
        for m, u in zip(M.unbind(-3)[:-1], U.unbind(-3)):
            starts.append(starts[-1] @ m + u)                               # (.., Dv, Dk) x (.., Dk, Dk)
    return torch.stack(starts, dim=-3)


# -----------------------------------------------------------------------------
# python scan.py


def main():
    import time
    torch.set_num_threads(1)
    torch.manual_seed(0)
    B, H, N, C, D = 1, 2, 256, 32, 32
    k = F.normalize(torch.randn(B, H, N, C, D), dim=-1)
    A = 0.5 * (k @ k.mT).tril(-1)                                           # half of each old answer is erased
    X = torch.linalg.inv(torch.eye(C) + A)
    tiles = (torch.randn(B, H, D, D), torch.randn(B, H, N, C, D), A, X, 0.5 * k, k, torch.full((B, H, N, 1, 1), 0.9))
    print(f'{N * C:,} tokens in {N} tiles: largest difference from one chain, of largest values; seconds')
    Scan.apply(*tiles, 1)                                                   # the first call warms up
    one = None
    for G in (1, 4, 16, 64):
        started = time.perf_counter()
        starts, _, _ = Scan.apply(*tiles, G)
        seconds = time.perf_counter() - started
        one = starts if one is None else one
        print(f'  {G:2} groups: {N // G:3} tiles and {G:2} groups in turn    '
              f'{(starts - one).abs().max() / one.abs().max():.0e}   {seconds:.3f}')


if __name__ == '__main__':
    main()
