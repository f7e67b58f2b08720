"""
Curves of runs, and every figure of README and results/, drawn from the logs and the JSON that lie there.

    python plot.py out/log.jsonl out-tf/log.jsonl --out=curves.svg      training loss, smoothed; validation as marks
    python plot.py out/log.jsonl --x=seconds                            over steps, seconds of training, or tokens
    python plot.py results/rates-cpu/*-8e-3-1337.txt                    what a run printed will do as well
    python plot.py --all                                                results/figures/*.svg, all of them again

It needs matplotlib, which nothing else here does: pip install matplotlib. Every number in a figure is read from a file;
the same files give the same bytes, by the same matplotlib.

Does NOT include: numbers of its own, live curves (train.py draws one in the terminal), anything interactive.
"""
import glob
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from statistics import fmean as mean, median

from cli import UsageError, UserError, atomic_write, build, check, one_line_errors, read_args, read_file
from log import names_of, number, read_run

one_line_errors()
RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'results')
SECONDS = 307           # of training on two cores, in results/records.md

# one colour for each memory and for each kind of learner, mid-tones that stand out on white and on black; else grey
GREY, RED, PINK, BLUE, GREEN, VIOLET, OCHRE, TEAL = (
    '#808890 #dc5a3c #d65a9c #3f86d8 #2f9e72 #a272d6 #b98a25 #2a9fb0'.split())
COLOURS = {'hope': RED, 'hope_light': PINK, 'hope_light,attention': TEAL, 'attention': BLUE,
           'gated_deltanet': GREEN, 'titans': VIOLET, 'mamba2': OCHRE}
LEARNERS = {'finetune': ('fine-tuning', BLUE), 'ewc': ('EWC', GREEN), 'replay-1': ('replay of 1 %', OCHRE),
            'replay-5': ('replay of 5 %', OCHRE), 'clock': ('fast level alone', VIOLET),
            'hope-0': ('with the start', VIOLET), 'clocks': ('slow levels by clocks', VIOLET),
            'hope-1': ('one slow level', RED), 'hope-2': ('two', RED), 'hope-3': ('three', RED),
            'sleep-1': ('one, and sleep', PINK)}


@dataclass
class Plot:
    """The drawing"""
    out: str = 'curves.svg'             # the file to write: .svg or .png
    x: str = 'step'                     # what the curves go over: step | seconds | tokens
    all: bool = False                   # every figure of README and results/ in the place of curves

    def __post_init__(self):
        check(self.x in ('step', 'seconds', 'tokens'), f"--x is step, seconds or tokens, not '{self.x}'")
        check(self.out.endswith(('.svg', '.png')), f"--out ends in .svg or .png, not '{self.out}'")


# -----------------------------------------------------------------------------
# reading, without matplotlib


def text_of(*path):
    return read_file(os.path.join(RESULTS, *path)).decode(errors='replace')


def best_runs(pattern):
    """Of the runs in results/, the one of each mixer that ended best."""
    runs = [read_run(path) for path in sorted(glob.glob(os.path.join(RESULTS, pattern))) if 'float32' not in path]
    runs.sort(key=lambda run: -run.marks[-1]['value'])
    return {run.settings['mixer']: run for run in runs}.values()


def read_needles(*path):
    """
    What eval_niah.py printed -> {(whether gates were closed below a floor, task, length): (found, low, high)}, in %;
    where the same was asked twice, the answer from more examples.
    """
    found, cells = {}, []
    for text in text_of('niah-cpu', *path).splitlines():
        if cell := re.match(r'(\w\w) +([\d,]+) tokens \| (\d+) examples \| +([\d.]+) % \[(\d+)-(\d+)\]', text):
            cells.append(cell.groups())
        if 'again with: python eval_niah.py' in text:   # the line below the cells says how they were found
            for task, length, examples, *shares in cells:
                key = '--gate_floor' in text, task, int(number(length))
                found[key] = max(found.get(key, (0,)), (int(examples), *map(float, shares)))
            cells = []
    return {key: shares for key, (_, *shares) in found.items()}


def read_costs():
    """bench-cpu.txt -> {mixer: {tokens: ms}} of training, medians on one core of an EPYC, and of decoding, the last."""
    text = re.sub(r'\bgla\b', 'mamba2', text_of('bench-cpu.txt'))           # as it was called when most was written
    training, row = {}, r'^ *([\d,]+)  (\w+) +(?:yes|no) +1 +[\d.]+ +\d+ +([\d,]+) '
    for tokens, mixer, speed in re.findall(row, text.partition('\n# Intel')[0], re.M):
        training.setdefault(mixer, {}).setdefault(int(number(tokens)), []).append(1000 / number(speed))
    training = {mixer: {n: median(ms) for n, ms in sorted(found.items())} for mixer, found in training.items()}
    heading, *rows = text.rpartition('\nmixer ')[2].partition('\n\n')[0].splitlines()
    contexts = [int(number(n)) for n in heading.split()]
    return training, {mixer: {n: float(ms) for n, ms in zip(contexts, cells[::2]) if ms != '-'}
                      for mixer, *cells in map(str.split, rows)}


def read_learners(*names):
    """{learner: what eval_continual.py found}, from JSON files in results/continual/; the last that has one counts."""
    files = [json.loads(text_of('continual', f'{name}.json')) for name in names]
    return {name: learner for file in files for name, learner in file['learners'].items()}


def read_clocks():
    """What cms.py printed -> [(tokens between two moves, [tokens read when it moved])], the fastest level first."""
    text = text_of('cms-cpu.txt')
    column = int(re.search(r'a column is (\d+) tokens', text)[1])
    rows = re.findall(r'^level \d, every +(\d+) tokens +([.*]+)$', text, re.M)
    return [(int(every), [column * (i + 1) for i, mark in enumerate(marks) if mark == '*']) for every, marks in rows]


# -----------------------------------------------------------------------------
# drawing


def new_figure(width, height, **panels):
    """A figure and its axes, in one style whatever the user's settings are: axes in grey, and nothing behind them."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f'plot.py draws with matplotlib ({error}): pip install matplotlib') from None
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({
        'svg.hashsalt': 'nested learning', 'svg.fonttype': 'none', 'figure.dpi': 72, 'savefig.dpi': 200,
        'figure.facecolor': 'none', 'axes.facecolor': 'none', 'axes.spines.top': False, 'axes.spines.right': False,
        'font.sans-serif': ['DejaVu Sans'], 'font.size': 9, 'axes.titlesize': 9, 'axes.titlelocation': 'left',
        'legend.frameon': False,
        'axes.prop_cycle': matplotlib.cycler(color=[RED, BLUE, GREEN, VIOLET, OCHRE, PINK, GREY]),
        **dict.fromkeys(['text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color'], GREY)})
    fig = Figure(figsize=(width, height), layout='constrained')
    return fig, fig.subplots(**panels)


def save(fig, path):
    """Without the date, which would make other bytes of the same figure."""
    with atomic_write(path) as file:
        fig.savefig(file, format=path[-3:], metadata={'Date': None})
    print(f'written to {path}')


def smooth(values):
    """Each the mean of its neighbours: of 20 on either side, fewer where a curve is young and steep, more of many."""
    reach = [min(i // 3, max(20, len(values) // 50)) for i in range(len(values))]
    return [mean(values[i - n:i + n + 1]) for i, n in enumerate(reach)]


def draw_run(ax, run, x, colour=None, name=None):
    """One run's curve, of at most 200 points, and its evaluations, over x(point) -> its end, where a label belongs."""
    curve = [*zip(map(x, run.curve), smooth([point['value'] for point in run.curve]))]
    line, = ax.plot(*zip(*curve[::math.ceil(len(curve) / 200)], curve[-1]), color=colour, lw=1.4, label=name)
    marks = [(x(mark), mark['value']) for mark in run.marks]
    ax.plot([at for at, _ in marks], [value for _, value in marks], 'o', color=line.get_color(), ms=4)
    return (marks or curve)[-1]


def label_ends(ax, ends):
    """[(x, y, text, colour)]: each text to the right of its point, those of one column as far apart as they need."""
    ax.figure.draw_without_rendering()                  # only now it is known where things are
    columns = {}
    for x, y, *label in sorted(ends, key=lambda end: end[1]):
        at, height = ax.transData.transform((x, y))
        columns.setdefault(round(at / 20), []).append((height, (x, y), *label))
    for column in columns.values():
        places = [column[0][0]]
        for height, *_ in column[1:]:
            places.append(max(height, places[-1] + 11))
        down = mean(places) - mean([height for height, *_ in column])
        for place, (height, point, text, colour) in zip(places, column):
            ax.annotate(text, point, (7, place - down - height), textcoords='offset points', color=colour, va='center')


def label_points(ax, points):
    """[(x, y, dx, dy, text, colour)], dx and dy errors: each text beside its point, where it covers least of others."""
    ax.figure.draw_without_rendering()

    def area(a, b): return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    def box(x0, y0, x1, y1, pad):
        (x0, y0), (x1, y1) = ax.transData.transform([(x0, y0), (x1, y1)])
        return x0 - pad, y0 - pad, x1 + pad, y1 + pad
    taken = [box(x, y, x, y, pad=7) for x, y, *_ in points]
    for x, y, dx, dy, *_ in points:
        taken += [box(x - dx, y, x + dx, y, pad=1), box(x, y - dy, x, y + dy, pad=1)]
    for x, y, _, _, text, colour in points:             # at one of its corners, or farther up or down
        tried = []
        for dx, dy in [(dx, dy) for dy in (4, -4, 14, -14, 24, -24) for dx in (5, -5)]:
            label = ax.annotate(text, (x, y), (dx, dy), textcoords='offset points', color=colour,
                                ha='left' if dx > 0 else 'right', va='bottom' if dy > 0 else 'top')
            its = label.get_window_extent().extents
            outside = area(its, its) - area(its, ax.bbox.extents)
            cost = sum(area(its, other) for other in taken) + 9 * outside + 9 * len(tried)
            tried.append((cost, len(tried), label, [*its]))
        for _, _, label, its in sorted(tried)[1:]:
            label.remove()
        taken.append(min(tried)[-1])


# -----------------------------------------------------------------------------
# the figures of README and results/


def draw_losses():
    """Every memory over tokens; and what five minutes on two cores make of some."""
    fig, (left, right) = new_figure(7.4, 3.4, ncols=2, sharey=True)
    ends = {left: [], right: []}

    def draw(ax, run, x):
        mixer = run.settings['mixer']
        colour = COLOURS.get(mixer, GREY)
        ends[ax].append((*draw_run(ax, run, x, colour), mixer.replace(',', ' with '), colour))
    for run in [*best_runs('rates-cpu/shared/*-1337.txt'), *best_runs('rates-cpu/attention4-8e-3-1337.txt')]:
        draw(left, run, lambda point: point['tokens'] / 1e6)
    for run in [*best_runs('records-cpu/shared/*-1.txt'), *best_runs('records-cpu/light/attention4-1.txt')]:
        total = run.marks[-1]['tokens']                 # as many as it reads in that time
        draw(right, run, lambda point: SECONDS * point['tokens'] / total)
    left.set(ylabel='bits per byte', ylim=(1.0, 2.45), xlabel='million tokens', title='the same tokens, a like size')
    right.set(xlabel='seconds of training on two cores', title='the same time')
    for ax in (left, right):
        label_ends(ax, ends[ax])
    return fig


def draw_needles():
    """Needles found against length, a panel for each task."""
    fig, axes = new_figure(7.2, 3.8, nrows=2, ncols=3, sharex=True, sharey=True)
    titles = ('s1: a number, in one line', 's2: a number, in text', 's3: a code, in text', 'mk: one of four keys',
              'mv: four values of a key', 'mq: four keys')
    for i, mixer in enumerate(('attention', 'gated_deltanet', 'titans', 'hope')):
        far = mixer != 'attention'                      # which had two stages of training, and has no gates to close
        found = read_needles(*['far'] * far, f'{mixer}.txt')
        lengths = sorted({length for closed, task, length in found if closed == far and task == 'mq'})
        x = [length * 1.06 ** (i - 1.5) for length in lengths]          # side by side, so that none hides another
        for ax, title in zip(axes.flat, titles):
            y, low, high = zip(*(found[far, title[:2], length] for length in lengths))
            bars = [(at, end) for at, *ends in zip(x, low, high) for end in (*ends, math.nan)]     # one line with gaps
            ax.plot(*zip(*bars), color=COLOURS[mixer], lw=0.7, alpha=0.7)
            ax.plot(x, y, 'o-', color=COLOURS[mixer], lw=1.4, ms=3, label=mixer)
            ax.set_title(title)
    axes[0, 0].set(xscale='log', ylim=(-4, 106), xticks=lengths, xticklabels=[f'{n:,}' for n in lengths])
    axes[0, 0].minorticks_off()
    fig.supxlabel('tokens', fontsize=9)
    fig.supylabel('found, %', fontsize=9)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=4)
    return fig


def draw_learners(files, texts, ylabel):
    """What is gained by reading against what is kept of it in the end."""
    (fig, ax), points = new_figure(6.4, 3.4), []
    for name, learner in read_learners(*files).items():
        (y, dy), (x, dx), (lost, _) = (learner[what] for what in ('gained', 'kept_first', 'lost'))
        if name in LEARNERS:
            said, colour = LEARNERS[name]
            points.append((100 * x, y, 200 * dx, 2 * dy, said, colour))
            ax.errorbar(100 * x, y, 2 * dy, 200 * dx, fmt='none', color=colour, lw=0.8, alpha=0.6)
            ax.plot(100 * x, y, 'o', color=colour, fillstyle='none' if lost > 0.01 * y else 'full')
            if lost > 0.01 * y:
                ax.set_title('hollow: loses some of what it knew before')
    ax.set(xlabel=f'kept in the end {texts}, %', ylabel=ylabel)
    label_points(ax, points)
    return fig


def draw_levels():
    """What is kept of four languages by so many slow levels: each language of each seed, and the mean of all."""
    fig, ax = new_figure(5, 3)
    found = read_learners('languages4')
    for n, (name, colour) in enumerate((('icl', GREY), ('hope-1', RED), ('hope-2', RED), ('hope-3', RED))):
        kept = [100 * share for run in found[name]['seeds'] for share in run['kept']]
        ax.plot([n + 0.02 * (i - len(kept) / 2) for i in range(len(kept))], kept, 'o', ms=3, color=colour, alpha=0.5)
        share, error = (100 * x for x in found[name]['kept'])
        ax.errorbar(n, share, 2 * error, fmt='D', ms=6, color=colour)
        ax.annotate(f'{share:.0f} %', (n, share), (12, 0), textcoords='offset points', color=colour, va='center')
    ax.set(xlabel='slow levels', ylabel='kept in the end, %', xticks=range(4), xticklabels=['none', '1', '2', '3'])
    return fig


def draw_costs():
    """Milliseconds a token against length, of training and of decoding."""
    fig, axes = new_figure(7.4, 3.3, ncols=2)
    for ax, costs, title in zip(axes, read_costs(), ('training, rows of so many tokens', 'decoding, after so many')):
        for mixer, ms in costs.items():
            ax.plot(ms.keys(), ms.values(), 'o-', color=COLOURS[mixer], ms=4, lw=1.4)
        lengths = sorted({n for ms in costs.values() for n in ms})
        ax.set(xscale='log', yscale='log', title=title, ylabel='ms a token', xlabel='tokens', xticks=lengths,
               xticklabels=[f'{n:,}' for n in lengths])
        ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        ax.yaxis.set_major_formatter('{x:g}')
        ax.minorticks_off()
        label_ends(ax, [(*[*ms.items()][-1], mixer, COLOURS[mixer]) for mixer, ms in costs.items()])
    return fig


def draw_clocks():
    """Which level moves when: a line where it does, behind the tokens that it learns from."""
    fig, ax = new_figure(6.4, 1.5)
    levels = read_clocks()
    for level, (every, moved) in enumerate(levels):
        ax.barh(-level, moved[-1], height=0.5, color=RED, alpha=0.3)
        ax.vlines(moved, -level - 0.25, -level + 0.25, color=RED, lw=1.4)
    ax.set(yticks=[-level for level in range(len(levels))], xticks=[0, *moved], xlim=(0, moved[-1] + 2),
           yticklabels=[f'level {level}, every {every}' for level, (every, _) in enumerate(levels)],
           xlabel='tokens that were read')
    ax.spines.left.set_visible(False)
    ax.tick_params(left=False)
    return fig


DRAW = {'losses': draw_losses, 'needles': draw_needles, 'levels': draw_levels, 'costs': draw_costs,
        'clocks': draw_clocks,
        'forgetting': lambda: draw_learners(['domains-former', 'domains'], 'of the first two of three texts',
                                            'gained, bits per byte'),
        'languages': lambda: draw_learners(['languages'], 'of the first of two languages', 'gained, % of the meanings')}


def draw_runs(runs, x):
    """Any runs, with a legend of what differs between them."""
    if len({run.unit for run in runs}) > 1:
        raise UserError('one of these runs read text and another did not: their losses have no unit in common')
    fig, ax = new_figure(6.4, 3.6)
    for run, name in zip(runs, names_of(runs)):
        draw_run(ax, run, lambda point: point[x], COLOURS.get(name), name)
    ax.set(xlabel='steps' if x == 'step' else x, ylabel=f'{runs[0].unit}: training, validation as marks')
    ax.locator_params(axis='x', nbins=5)                # what is below them may be long
    ax.xaxis.set_major_formatter('{x:,.0f}')
    ax.legend()
    return fig


def main():
    logs = [word for word in sys.argv[1:] if not word.startswith('-')]
    args, = build([Plot], read_args([Plot], [word for word in sys.argv[1:] if word.startswith('-')]))
    if bool(logs) == args.all:
        raise UsageError('give logs of runs, as in python plot.py out/log.jsonl, or --all for the figures of the pages')
    if args.all:
        for name, draw in DRAW.items():
            save(draw(), os.path.join(RESULTS, 'figures', f'{name}.svg'))
    else:
        save(draw_runs([read_run(path) for path in logs], args.x), args.out)


if __name__ == '__main__':
    main()
