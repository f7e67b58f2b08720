"""
Rows that are longer than a step (--carry): a row of steps x T tokens is read T tokens a step. The state goes on from
step to step, gradients end with each: truncated backpropagation through time.

Does NOT include: rows of different lengths, states that outlive their rows.
"""
import torch


class Rows:
    """n rows of a task at a time, steps x T tokens long. generator: all that decides them, with progress."""
    def __init__(self, task, n, T, steps, generator):
        self.task, self.n, self.T, self.steps, self.generator = task, n, T, steps, generator
        self.drawn, self.drawn_from = {}, None

    def at(self, step, progress):
        """
        What a model is called with at this step, counted from 0: {'idx', 'targets' and, if any, 'weights': (n, T)}.
        progress: the share of training that was done when these rows began.
        """
        place = step % self.steps
        if place == 0 or not self.drawn:
            self.drawn_from = self.generator.get_state()
            rows = self.task.batch(self.n, self.steps * self.T, self.generator, progress)
            self.drawn = {name: x for name, x in zip(('idx', 'targets', 'weights'), rows) if x is not None}
        return {name: x[:, place * self.T:(place + 1) * self.T].contiguous() for name, x in self.drawn.items()}

    def generator_state(self, step):
        """The generator's, for a run that goes on with this step: within rows, they are drawn again."""
        return self.drawn_from if step % self.steps else self.generator.get_state()


# -----------------------------------------------------------------------------
# the state between two steps


def map_state(f, *states):
    """f of the tensors at one place in all states. One under two names stays one, as it is what was compiled for."""
    done = {}

    def at(*xs):
        place = tuple(map(id, xs))
        if torch.is_tensor(xs[0]) and place not in done:
            done[place] = f(*xs)
        return done.get(place, xs[0])
    return [{name: at(*(layer[name] for layer in layers)) for name in layers[0]} for layers in zip(*states)]


def join_rows(states):
    """The state of all rows, from the states of the parts that they were read in. Gradients end with it."""
    return map_state(lambda *rows: torch.cat(rows).detach(), *states)


def take_rows(state, rows, device):
    """The state of these rows to read on from. It asks for gradients, as an empty one does, for one graph."""
    return map_state(lambda x: x[rows].to(device).requires_grad_(x.is_floating_point()), state)


def constants(state):
    """All that is no tensor in a state: what code that was compiled for it takes for granted."""
    return tuple(x for layer in state for x in layer.values() if not torch.is_tensor(x))
