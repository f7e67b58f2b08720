"""
Several levels read the same text: what each of them predicted decides how much it is believed, and which of them keeps
what was learned.

A level that learns from new text spoils what it knew of the old. So it is not the only one that is read: beside it are
slower levels that keep what it knew, and what training learned, and a token's probability is a mixture of all (the
paper's independent levels, "Aggregated", with weights that are learned while reading). Exact Bayes but for a share that
is dealt out anew at every token, so that who was right may change: each change of the best level costs the mixture at
most log(levels / share) nats, about 8.

    python evidence.py      three sources in turn, read by one level that forgets and with levels that keep

A stream is its own. Nobody is told where one text ends and which it is: a level recognises the text that it helps with.

Does NOT include: models (cms.py has levels of MLPs), old text, labels; more levels than it begins with.

Glossary (fixed share: Herbster and Warmuth 1998, "Tracking the Best Expert")
    w_t,l           log_w       (B, R)          log weight of a level, from what it said of all tokens so far
    p_t,l           log_p       (B, R, T)       log probability that it gave to the token that came
    s               share                       of all weight, dealt out evenly after every token
    B streams, T time, K slow levels that keep; rows R: the fast level, the slow ones, those that stay: what was made in
    sleep, if anything, and what training learned
"""
import torch
import torch.nn.functional as F

from carry import map_state

WINDOW = 16             # chunks between two moves of the slow levels
KNOWN, LEAST = 0.5, 0.3 # of what a level usually gains, and nats per token: so much it must gain to recognise a text


def weigh(log_w, log_p, share):
    """The log weights (B, R, T) after each of T tokens, from those before, (B, R), and log_p (B, R, T)."""
    p, w, out = (log_p - log_p.amax(1, keepdim=True)).exp(), log_w.exp(), []        # whoever is best gives 1
    for now in p.unbind(2):
        w = w * now
        w = w * ((1 - share) / w.sum(1, keepdim=True)) + share / w.shape[1]
        out.append(w)
    return torch.stack(out, dim=2).log()


def empty_book(B, K, nights=0, device=None):
    """
    What is known of the levels, K slow ones that keep, and those that stay, of which the last is what training learned:
    nats (2, B, R), their losses since the slow ones last could move, summed over so many chunks, and over the last
    quarter of them; usual (B, K), what a slow level usually gains over those that stay, in nats per token; saved
    (B, 1 + K), nats gained by the fast level on text that no slow one recognises, and on all text that each slow one
    recognised; slept (B,), what had been saved by all that sleep has made one (sleep.py).
    """
    def zeros(*shape): return torch.zeros(*shape, device=device)
    return {'nats': zeros(2, B, K + 2 + nights), 'chunks': 0, 'usual': zeros(B, K), 'saved': zeros(B, 1 + K),
            'slept': zeros(B)}


def judge(book, nats, tokens):
    """
    Whether the slow levels move, after a chunk and before anybody learns from it.

    nats    (B, R) mean loss of each level on the chunk, of so many tokens: the fast one, the slow ones, those that stay
    returns source (B, R), level l is from now on what level source[l] is now, or None, nobody moves; and the new book

    It happens every WINDOW chunks. A slow level recognises the text if it gains more than KNOWN of what it usually
    gains over the best of those that stay, in the window and in its last quarter.

    recognised      by the slow level that reads it best: if the fast level reads it better, the slow one becomes what
                    the fast one is, which has learned more of it; if not, the fast one becomes what the slow one is
    new             to all, in the window and in its last quarter: what the fast level knows is kept in the place of the
                    slow level that has saved least, as soon as it has saved twice that itself (until then it is in the
                    fast level alone). If one that stays reads it much better, the fast level begins anew from there
    neither         the text has changed on the way: nobody moves
    """
    count, quarter = book['chunks'] + 1, max(1, WINDOW // 4)
    late = float(count > WINDOW - quarter)
    summed = book['nats'] + torch.stack([nats, late * nats]).to(book['nats'].dtype)
    book = book | {'nats': summed, 'chunks': count}
    K = book['usual'].shape[1]
    if count < WINDOW or K == 0:
        return None, book
    (B, R), stream = nats.shape, torch.arange(len(nats), device=nats.device)
    usual, saved = book['usual'].clone(), book['saved'].clone()
    nats = torch.stack([summed[0] / WINDOW, summed[1] / quarter])
    fast, slow, stay = nats.split([1, K, R - 1 - K], dim=2)
    best_to_stay = stay[0].argmin(1)
    fast, start = fast[..., 0], stay[:, stream, best_to_stay]                       # (2, B) both; slow (2, B, K)

    # who recognises it, and what it saves that a level has learned it
    helps = (usual > 0) & (start[..., None] - slow > (KNOWN * usual).clamp(min=LEAST))          # (2, B, K)
    recognises, new = helps.all(0), ~helps.any(0).any(1)
    known = recognises.any(1)
    best = slow[0].masked_fill(~recognises, torch.inf).argmin(1)
    gain = start[0] - torch.where(known, torch.fmin(fast[0], slow[0, stream, best]), fast[0])
    saves = (tokens * WINDOW * gain).nan_to_num()
    saved[:, 0] = torch.where(new, saved[:, 0] + saves, saved[:, 0]).clamp(min=0)

    # the slow level that is concerned, and who becomes whom
    place = torch.where(known, best, saved[:, 1:].argmin(1))
    ahead = fast[0] <= slow[0, stream, place]
    gains = (saved[:, 0] > 2 * saved[stream, 1 + place]) & (start - fast > LEAST).all(0)    # else nobody recognises it
    keep, anew = torch.where(known, ahead, new & gains), new & (start < fast - LEAST).all(0)
    source = torch.arange(R, device=nats.device).repeat(B, 1)
    source[stream, 1 + place] = torch.where(keep, 0, 1 + place)
    source[:, 0] = torch.where(known & ~ahead, 1 + place, torch.where(anew, 1 + K + best_to_stay, 0))

    # what it has saved now, and what it usually gains: what the fast level has saved goes to who becomes what it is
    its, before = saved[stream, 1 + place], usual[stream, place]
    saved[stream, 1 + place] = torch.where(known, its + saves, its.masked_fill(keep, 0)) + keep * saved[:, 0]
    saved[:, 0] = saved[:, 0].masked_fill(known | keep | anew, 0)
    usual[stream, place] = torch.where(known, before + (gain - before) / 4, torch.where(keep, gain, before))
    return source, book | {'nats': torch.zeros_like(summed), 'chunks': 0, 'usual': usual, 'saved': saved}


# -----------------------------------------------------------------------------
# levels as rows of a batch, in the state of cms.learn


def n_rows(config):
    """Rows that read for one stream: of copies with a read-out every level and what training learned, else one."""
    return len(config.chunks) + 1 if config.cms_topology == 'copies' and config.cms_share else 1


def read_out(o, logits, idx, state):
    """
    The levels' logits (B R, T, V) at tokens idx (B, T) -> the logarithm of their mixture (B, T, V), and the state with
    what these tokens say of the levels.
    """
    log_p = logits.log_softmax(-1).unflatten(0, (len(idx), -1))                                 # (B, R, T, V)
    gave = torch.cat([state['said'][:, :, None], log_p[:, :, :-1]], dim=2)      # each token was predicted one before it
    gave = gave.gather(3, idx[:, None, :, None].expand(-1, log_p.shape[1], -1, 1))[..., 0]      # (B, R, T)
    log_w = weigh(state['log_w'], gave, o.cms_share)
    return (log_w[..., None] + log_p).logsumexp(1), state | {'log_w': log_w[..., -1], 'said': log_p[:, :, -1]}


def with_start(moved):
    """How far the levels of copies have moved (B, K, m, n), and the start, which never does -> (B, R, m, n)."""
    return F.pad(moved, (0, 0, 0, 0, 0, 1))


def resumed(block, kept):
    """A mixer's state that goes on from what was kept of one, as if its chunk began there."""
    at_start = {name: kept[name[:-3]] for name in block if name[-3:] == '_xi' and kept}
    return block | kept | at_start


def with_fastest(kept, recurrent, R):
    """What levels keep, and of the fastest of the R rows of each stream what it has read so far, recurrent."""
    def join(old, now): return torch.cat([now.unflatten(0, (-1, R))[:, :1], old.unflatten(0, (-1, R))[:, 1:]], dim=1)
    return map_state(lambda old, now: join(old, now).flatten(0, 1), kept, recurrent)


def copied(state, source, restart=False):
    """
    The state in which level l of stream b is what source[b, l] was, source (B, R). What a level knows is how far its
    weights have moved and what it keeps of the recurrent memories: the fastest what it has read so far, a slow one what
    it was given, the start nothing. restart: all but the fastest read on from what they keep.
    """
    B, R = source.shape
    stream = torch.arange(B, device=source.device)[:, None]
    def rows(x): return x.unflatten(0, (B, R))[stream, source].flatten(0, 1)
    delta = {name: with_start(x)[stream, source[:, :-1]] for name, x in state['delta'].items()}
    kept = map_state(rows, with_fastest(state['kept'], state['recurrent'], R))
    recurrent = map_state(rows, state['recurrent'])
    if restart:
        recurrent = [*map(resumed, recurrent, with_fastest(kept, recurrent, R))]
    return state | {'recurrent': recurrent, 'kept': kept, 'delta': delta,
                    'said': state['said'][stream, source], 'log_w': state['log_w'].gather(1, source).log_softmax(1)}


# -----------------------------------------------------------------------------
# python evidence.py


def main():
    """A level is a table of how often each of 16 symbols came; three sources, each of which prefers two of them."""
    torch.manual_seed(0)
    V, n, C, order = 16, 2000, 50, 'abcaba'
    likes = {name: torch.full((V,), 0.2 / V).index_fill(0, torch.tensor([i, i + 5]), 0.4)
             for i, name in enumerate('abc')}
    text = torch.cat([likes[name].multinomial(n, replacement=True) for name in order])[None]
    print(f'{n} symbols of each source in turn; nats per symbol, at best {-(likes["a"] * likes["a"].log()).sum():.2f}')
    print(f"{'':<34}" + ''.join(f'{name:>7}' for name in order))
    for name, K in (('a fast level', 0), ('... and the start', 0), ('... and one slow level', 1),
                    ('... and three slow levels', 3)):
        levels, book = torch.full((1, K + 2, V), 1 / V), empty_book(1, K)
        log_w, losses = torch.zeros(1, K + 2).log_softmax(1), []
        for chunk in text.split(C, dim=1):
            log_p = levels.log()[:, :, chunk[0]]                                                # (1, R, C)
            after = weigh(log_w, log_p, 0.001)
            before = torch.cat([log_w[..., None], after[..., :-1]], dim=2)
            losses.append(-(before + log_p).logsumexp(1)[0] if name != 'a fast level' else -log_p[0, 0])
            log_w = after[..., -1]
            source, book = judge(book, -log_p.mean(2), C)
            levels = levels if source is None else levels[torch.arange(1)[:, None], source]
            seen = F.one_hot(chunk, V).float().mean(1)                                          # (1, V)
            levels[:, 0] = 0.9 * levels[:, 0] + 0.1 * (0.9 * seen + 0.1 / V)
        print(f'{name:<34}' + ''.join(f'{part.mean().item():7.2f}' for part in torch.cat(losses).split(n)))


if __name__ == '__main__':
    main()
