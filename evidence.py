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
    B streams, T time, K slow levels; rows R = 1 + K + 1: the fast level, the slow ones, what training learned
"""
import torch
import torch.nn.functional as F

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


def empty_book(B, K, device=None):
    """
    What is known of the levels: nats (B, R), their losses since the slow ones last could move, summed over so many
    chunks; usual (B, K), what a slow level usually gains, in nats per token; saved (B, 1 + K), nats by which the fast
    level was ahead of all others, since it was kept or went back, and in all windows after which each slow level moved.
    """
    return {'nats': torch.zeros(B, K + 2, device=device), 'chunks': 0, 'usual': torch.zeros(B, K, device=device),
            'saved': torch.zeros(B, K + 1, device=device)}


def judge(book, nats, tokens):
    """
    Whether the slow levels move, after a chunk and before anybody learns from it.

    nats    (B, R) mean loss of each level on the chunk, of so many tokens
    returns source (B, R), level l is from now on what level source[l] is now, or None, nobody moves; and the new book

    It happens every WINDOW chunks. A slow level recognises the text if it gains about as much over what training
    learned as it usually does.

    recognised      by the slow level that reads it best: if the fast level reads it better, the slow one becomes what
                    the fast one is, which has learned more of it; if not, the fast one becomes what the slow one is
    new             what the fast level knows is kept in the place of the slow level that has saved least, as soon as it
                    has saved more itself
    """
    book = book | {'nats': book['nats'] + nats.to(book['nats'].dtype), 'chunks': book['chunks'] + 1}
    if book['chunks'] < WINDOW or nats.shape[1] == 2:
        return None, book
    (B, R), stream = nats.shape, torch.arange(len(nats), device=nats.device)
    nats, usual, saved = book['nats'] / WINDOW, book['usual'].clone(), book['saved'].clone()
    fast, slow, start = nats[:, 0], nats[:, 1:-1], nats[:, -1]

    # who recognises it, and what it saves that the fast level is there
    gain = start[:, None] - slow                                                    # (B, K)
    recognises = (usual > 0) & (gain > (KNOWN * usual).clamp(min=LEAST))
    known = recognises.any(1)
    lead = tokens * WINDOW * (nats[:, 1:].amin(1) - fast)
    saved[:, 0] = torch.where(known, 0, saved[:, 0] + lead.nan_to_num())

    # the slow level that is concerned, and who becomes whom
    best = slow.masked_fill(~recognises, torch.inf).argmin(1)
    place = torch.where(known, best, saved[:, 1:].argmin(1))
    ahead = fast <= slow[stream, place]
    gains = (saved[:, 0] > saved[stream, 1 + place]) & (start - fast > LEAST)       # else nobody would recognise it
    keep = torch.where(known, ahead, gains)
    source = torch.arange(R, device=nats.device).repeat(B, 1)
    source[stream, 1 + place] = torch.where(keep, 0, 1 + place)
    source[:, 0] = torch.where(known & ~ahead, 1 + place, 0)

    # what it has saved now, and what it usually gains
    saved_more = torch.where(known, saved[stream, 1 + place] + lead.clamp(min=0), saved[:, 0])
    saved[stream, 1 + place] = torch.where(known | keep, saved_more, saved[stream, 1 + place])
    saved[:, 0] = saved[:, 0].masked_fill(keep, 0)
    before, now = usual[stream, place], start - torch.minimum(fast, slow[stream, place])
    usual[stream, place] = torch.where(known, before + (now - before) / 4, torch.where(keep, start - fast, before))
    return source, {'nats': torch.zeros_like(nats), 'chunks': 0, 'usual': usual, 'saved': saved}


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
