"""
Talk to a trained model, or measure it on a text.

    python sample.py                                    write something from nothing
    python sample.py "def fibonacci(n):"                go on from a prompt; '-' reads the prompt from stdin
    python sample.py --interactive                      a prompt a line; the model remembers the lines before
    python sample.py --score=FILE                       bits per byte over a file, read as one stream of any length
    python sample.py --score=FILE --learn               ... while its MLPs learn from what they read (cms.py)
    python sample.py --score=FILE --places              ... and how they fall from the start of a long text to its end
    python sample.py "hello" --learn --memory=me.pt     ... and remember it: what was learned is kept in a file
    python sample.py --memory=me.pt --memory_info       what is in that file

Text goes to stdout as it comes; speed and the size of the model's state go to stderr. A recurrent memory's state has
the same size after ten tokens and after a million; attention keeps the last block_size tokens.

Does NOT include: chat templates, batched serving.
"""
import codecs
import collections
import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass

import torch

from cli import UsageError, UserError, build, check, locked, one_line_errors, plain, print_block, read_args
from machine import (describe_levels, load_checkpoint, load_learner, load_memory, load_model, load_tokenizer, owner,
                     pick_checkpoint, pick_device, save_memory)
from model import check_finite, state_bytes, stream
from sleep import Sleeper
from tokenizer import encode

one_line_errors()

# -----------------------------------------------------------------------------
# knobs


@dataclass
class Sample:
    """The sample"""
    prompt: str = ''                    # what to go on from (the bare word); '-' reads it from stdin
    out_dir: str = 'out'                # the folder of the checkpoint
    best: bool = False                  # the checkpoint of the lowest validation loss, not the last
    max_new_tokens: int = 500           # tokens to write
    temperature: float = 0.8            # 0 always takes the most likely token; 1 samples what the model believes
    top_k: int = 0                      # sample among the k most likely tokens (0 = all)
    top_p: float = 1.0                  # sample among the fewest tokens that together have this probability
    stop: bool = True                   # end at the end-of-text token
    num_samples: int = 1                # texts to write
    seed: int = 1337                    # of the samples
    interactive: bool = False           # read prompts from the terminal, a line each
    score: str = ''                     # a file to measure instead of writing; '-' reads stdin
    places: bool = False                # ... also by how many tokens stand before: 0-512, 512-1,024, 1,024-2,048, ...
    # learning while reading
    learn: bool = False                 # move the MLPs' weights by what is read, on the token clock
    memory: str = ''                    # a file that keeps what was read and learned from one call to the next
    memory_info: bool = False           # print what is in that file, and end
    cms_chunks: str = ''                # tokens between two moves of each level ('' = as before, or 128,change,...)
    cms_step: float = -1.0              # inner step size of all levels (below 0 = as trained)
    cms_share: float = -1.0             # of the weight of all levels, dealt out at every token (below 0 = as before)
    sleep_every: int = 0                # tokens between two nights, in which levels become one (sleep.py; 0 = none)
    device: str = 'auto'                # cpu | cuda | mps; auto is cuda where there is one

    def __post_init__(self):
        check(self.max_new_tokens >= 1, f'--max_new_tokens must be at least 1, not {self.max_new_tokens}')
        check(0 <= self.seed < 2**63, f'--seed must be at least 0 and below 2^63, not {self.seed}')
        check(self.num_samples >= 1, f'--num_samples must be at least 1, not {self.num_samples}')
        check(0 <= self.temperature < math.inf, f'--temperature must be at least 0, not {self.temperature}')
        check(self.top_k >= 0, f'--top_k must be at least 0, not {self.top_k}')
        check(0 < self.top_p <= 1, f'--top_p must be above 0 and at most 1, not {self.top_p}')
        check(self.cms_step < math.inf, f'--cms_step must be a number, not {self.cms_step}')
        check(self.sleep_every >= 0, f'--sleep_every must be at least 0, not {self.sleep_every}')
        check(self.cms_share < 1, f'--cms_share must be below 1, not {self.cms_share}')


given = read_args([Sample], sys.argv[1:], positional='prompt')
args, = build([Sample], given)
if sum(('score' in given, args.interactive, 'prompt' in given)) > 1:
    raise UsageError('give one of a prompt, --interactive and --score')
if args.places and 'score' not in given:
    raise UsageError('--places is for --score=FILE')
if args.memory_info and not args.memory:
    raise UsageError('--memory_info needs --memory=FILE')
for_learning = {'memory', 'cms_chunks', 'cms_step', 'cms_share', 'sleep_every'}
if not args.learn and not args.memory_info and for_learning & set(given):
    raise UsageError('--memory, --sleep_every and the --cms options are for --learn')
if args.memory and args.num_samples > 1:
    raise UsageError('a memory file follows one text: --num_samples must be 1 with --memory')

# -----------------------------------------------------------------------------
# the model

torch.set_flush_denormal(True)                          # as in training
device = pick_device(args.device)
ckpt_path = pick_checkpoint(args.out_dir, args.best)
checkpoint = load_checkpoint(ckpt_path)
hold = contextlib.ExitStack()                           # the memory file is ours until this process ends
if args.memory and not args.memory_info:
    hold.enter_context(locked(args.memory))
whose = owner(checkpoint) if args.memory else None
kept = None
if os.path.exists(args.memory):
    kept = load_memory(args.memory, whose, args.cms_chunks, args.cms_share, device)
if args.learn or args.memory_info:                      # any model can: with the clock it had before, or a guess
    chunks, share = (kept['cms_chunks'], kept['cms_share']) if kept else (args.cms_chunks, args.cms_share)
    if args.sleep_every and not chunks and not checkpoint['config']['cms_chunks']:
        chunks = '128,change,change,night'
    reader = load_learner(checkpoint, device, chunks, args.cms_step, share).eval()
    model = reader.model
else:
    reader = model = load_model(checkpoint, device).eval()
enc = load_tokenizer(checkpoint, ckpt_path)             # of as many tokens as the model knows
if args.learn and args.sleep_every:
    reader = Sleeper(reader, args.sleep_every, enc.eot_token, args.seed)
block_size = model.config.block_size


def note(*words):
    with contextlib.suppress(OSError):                  # a full stderr must not cost a memory file
        print(*words, file=sys.stderr, flush=True)


def tell(text, end=''):
    """Text to stdout as it comes; only a terminal is spared control characters."""
    print(plain(text) if sys.stdout.isatty() else text, end=end, flush=True)


def as_idx(tokens):
    """Token ids -> (1, T) on the device."""
    return torch.tensor([list(tokens)], dtype=torch.long, device=device)


# -----------------------------------------------------------------------------
# writing


def write(tokens, state, generator):
    """Go on from tokens, streaming text to stdout. Returns the token that is yet to be read and the state before it."""
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')       # a character may span several tokens
    stop_token = enc.eot_token if args.stop else None
    start, n, token = time.perf_counter(), 0, None
    for token, state in stream(reader, as_idx(tokens), args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                               stop_token, generator, state):
        n, token = n + 1, token.item()
        if token != enc.eot_token:
            tell(decoder.decode(enc.decode_single_token_bytes(token)))
    tell(decoder.decode(b'', final=True), '\n')
    note(f'[{n} tokens, {n / (time.perf_counter() - start):.0f} tok/s, state {state_bytes(state) / 1024:.0f} KiB]')
    return [token], state


def prompt_tokens(text):
    """Bytes of a prompt -> token ids, or a UserError if there is nothing in it or more than attention can see."""
    tokens = encode(enc, text).tolist()
    if not tokens:
        raise UserError('the prompt is empty; leave it out to write from nothing')
    if 'attention' in model.config.mixers and len(tokens) > block_size:
        raise UserError(f'the prompt has {len(tokens)} tokens, but this attention model sees {block_size} '
                        '(its block_size); shorten it, or use a model with a recurrent mixer')
    return tokens


# -----------------------------------------------------------------------------
# scoring


@torch.no_grad()
def score(path, last, state):
    """
    Bits per byte over a file: every token is predicted from all before it, the first from `last`. Returns the token
    that is yet to be read and the state before it.
    """
    try:
        file = sys.stdin.buffer if path == '-' else open(path, 'rb')
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    tokens_read, start = 0, time.perf_counter()
    nats, n_bytes = collections.Counter(), collections.Counter()        # of each stretch, by the place where it ends
    while piece := file.read(1 << 20):                  # memory stays constant; a bpe word at a seam costs a bit more
        tokens, i = encode(enc, piece).tolist(), 0
        while i < len(tokens):
            end = max(512, 1 << tokens_read.bit_length())               # the next power of two
            part = tokens[i:i + min(block_size, end - tokens_read)]
            _, loss, state = reader(as_idx([last] + part[:-1]), as_idx(part), state)
            check_finite(loss)
            nats[end] += loss.item() * len(part)
            n_bytes[end] += len(enc.decode_bytes(part))
            i, tokens_read, last = i + len(part), tokens_read + len(part), part[-1]
            if sys.stderr.isatty():
                print(f'\r{tokens_read:,} tokens, {nats.total() / tokens_read:.4f} nats per token ', end='',
                      file=sys.stderr)
    if sys.stderr.isatty():
        note()
    if not tokens_read:
        raise UserError(f'{path} is empty; there is nothing to score')
    speed = tokens_read / (time.perf_counter() - start)
    print_block(file=path, bytes=n_bytes.total(), tokens=tokens_read,
                nats_per_token=f'{nats.total() / tokens_read:.4f}',
                bits_per_byte=f'{nats.total() / math.log(2) / n_bytes.total():.4f}', tokens_per_second=f'{speed:.0f}',
                state_bytes=state_bytes(state))
    for end in nats if args.places else ():
        stretch = f'{end // 2 if end > 512 else 0:,}-{min(end, tokens_read):,}'
        print_block(**{stretch: f'{nats[end] / math.log(2) / n_bytes[end]:.4f} bits per byte of {n_bytes[end]:,}'})
    return [last], state


# -----------------------------------------------------------------------------
# remembering from one call to the next


def keep(tokens, state):
    """Tokens yet to be read and the state before them go to --memory, where there is one."""
    if args.memory and state is not None:
        save_memory(args.memory, whose, reader, tokens, state)


def print_memory(state):
    """What is in a memory file: how much was read, and what each level holds."""
    print_block(memory=args.memory, tokens_read=state['learned'] + state['pending'].shape[1],
                tokens_learned=state['learned'], bytes=os.path.getsize(args.memory), **describe_levels(model, state))


# -----------------------------------------------------------------------------
# go

rng = torch.Generator(device=device).manual_seed(args.seed)
pending, state = (kept['next'], kept['state']) if kept else ([], None)
if args.memory_info:
    if kept is None:
        raise UserError(f'there is no memory file {args.memory} yet')
    print_memory(state)
    sys.exit()
if 'score' in given:
    keep(*score(args.score, (pending or [enc.eot_token])[-1], state))
elif args.interactive:
    note('a prompt a line; the model goes on from all lines so far. Ctrl-D ends.')
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            note()
            break
        tokens = encode(enc, os.fsencode(line + '\n')).tolist()
        pending, state = write(pending + tokens, state, rng)
        keep(pending, state)                            # after every line: a Ctrl-C while it writes loses one
else:
    if 'prompt' in given:
        text = sys.stdin.buffer.read() if args.prompt == '-' else os.fsencode(args.prompt)
        tokens = pending + prompt_tokens(text)
    else:
        text, tokens = b'', pending or [enc.eot_token]
    for i in range(args.num_samples):
        if args.num_samples > 1:
            note(f'--- sample {i + 1} of {args.num_samples}')
        tell(text.decode(errors='replace'))
        pending, after = write(tokens, state, rng)
    keep(pending, after)
