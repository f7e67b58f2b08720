"""
Launches and bytes of a training step on a GPU, counted on a machine that has none.

    python bench.py --count                                             attention and hope, the default size
    python bench.py --count --preset=gpt2 --mixers=attention,hope --lengths=2048 --tokens=32768
    total = count_step(nn.Linear(64, 32), [torch.empty(8, 64)])         {'loops': [launches, bytes], 'products': ...}

torch.compile does all that it would do for an NVIDIA GPU up to writing kernels: it traces a step, forms its forward and
backward graphs and decides which loops become one kernel. The tensors have shapes and no numbers (FakeTensorMode), so a
large model takes no memory. They are on the CPU while autograd sees them, as it cannot run on a device that torch was
not built for, and on 'cuda' when Inductor does, whose idea of the device is replaced by an H100's numbers. Then every
call of a graph adds what that graph launches: its fused loops, its matrix products, and other kernels of torch's. Bytes
are of all that a kernel reads and writes, of a slice the slice, as if nothing stayed in the cache.

How far off: of a hope layer of gpt2's size, as it was when a CUDA build of torch counted it, one launch in 7,504 and in
3,264, and 6 and 12 % too many bytes (memory_chunk 64 and 256; counted so by the script that this file was made from,
and both with whole buffers for slices; see results/gpu-counts.txt). That is one memory on one version of torch.

Does NOT include: seconds; what torch launches outside compiled code (copies between the chunks of a long sequence) or
beside its own kernels (a triangular solve copies first); the optimizer. Needs no compiler and no Triton, but reaches
into torch: other versions than 2.13 may count differently, or not at all.
"""
import contextlib
import math
import types
import warnings
from dataclasses import replace
from unittest.mock import patch

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config, scheduler
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import Layout
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map

import titans
from model import Hope

KINDS = ('loops', 'products', 'others')
H100 = types.SimpleNamespace(name='H100', major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
                             max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32)


def on_gpu(x):
    """A tensor without numbers, or the name of a device, as on a GPU; anything else as it is."""
    gpu = torch.device('cuda', 0)
    if not isinstance(x, FakeTensor):
        return gpu if isinstance(x, torch.device) else x
    with unset_fake_temporarily():
        return FakeTensor(x.fake_mode, torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device='meta'), gpu)


class CountedGraph(GraphLowering):
    """A forward or backward graph as Inductor compiles it for a GPU; to call it adds to total what it launches."""
    total = None

    def __init__(self, gm, example_inputs, **kwargs):
        self.outputs = [x.meta['val'] if isinstance(x, torch.fx.Node) else x for x in gm.graph.output_node().args[0]]
        for node in gm.graph.nodes:
            node.meta['val'] = tree_map(on_gpu, node.meta.get('val'))
            node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), on_gpu)
        super().__init__(gm, example_inputs=[on_gpu(x) for x in example_inputs], **kwargs)

    def run(self, *inputs):
        return super().run(*map(on_gpu, inputs))

    def compile_to_module(self):
        """In the place of kernels, what they would be."""
        self.init_wrapper_code()
        self._update_scheduler()            # fuses
        launches = [(kind(node), self.bytes_of(node)) for node in self.scheduler.nodes]

        def call(inputs):
            for name, size in launches:
                if name:
                    self.total[name][0] += 1
                    self.total[name][1] += size
            return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if torch.is_tensor(x) else x
                    for x in self.outputs]
        return types.SimpleNamespace(call=call, __file__='', key='')

    def bytes_of(self, node):
        """What a kernel reads and writes. Inductor's own count is never less: it has a buffer for a slice of it."""
        buffers = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        touched = dict.fromkeys(buffers, 0)
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            for x in (*node.node.inputs, node.node):                    # views of what the kernel takes, and its result
                if x.get_name() in buffers and isinstance(x.maybe_get_layout(), Layout):
                    numel = math.prod(int(n) for n, step in zip(x.get_size(), x.get_stride()) if step)
                    touched[x.get_name()] += numel * x.get_dtype().itemsize
        else:
            deps = node.read_writes.reads | node.read_writes.writes         # of a StarDep all of the buffer
            for dep in {dep.normalize() if isinstance(dep, MemoryDep) else dep for dep in deps}:
                if dep.name in buffers:
                    touched[dep.name] += int(dep.get_numel()) * self.get_dtype(dep.name).itemsize
        return sum(min(size, touched[name] or size) for name, size in buffers.items())  # several results: all of each


def kind(node):
    """What the scheduler's node launches: one of KINDS, or None if it is only a name for a buffer."""
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return None
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        return 'loops'
    name = str(getattr(node.node, 'python_kernel_name', None))
    if 'MultiOutput' in type(node.node).__name__:
        return None
    return 'products' if name.startswith('extern_kernels.') and name.endswith('mm') else 'others'


@contextlib.contextmanager
def as_for_a_gpu(total):
    """Whatever torch.compile compiles here is for an H100, adds to total when it is called, and computes nothing."""
    parts, gpu = titans.parts, torch.device('cuda')     # the one place where a memory asks what device it is on
    numbers = {'get_device_properties': H100, 'get_compute_capability': 90, 'is_bf16_supported': True}
    with contextlib.ExitStack() as stack:
        for name, value in numbers.items():
            stack.enter_context(patch.object(CudaInterface, name, staticmethod(lambda *_, value=value, **__: value)))
        stack.enter_context(patch.object(scheduler, 'has_triton', lambda *_: True))
        stack.enter_context(patch.object(compile_fx, 'GraphLowering', CountedGraph))
        stack.enter_context(patch.object(CountedGraph, 'total', total))
        stack.enter_context(patch.object(titans, 'parts', lambda *args: parts(*args[:-1], gpu)))
        stack.enter_context(config.patch(force_disable_caches=True))        # nobody else is to find these graphs
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter('ignore')                                     # of tensors that have no address
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


def count_step(module, inputs, dtype=torch.float32):
    """
    Forward of module(*inputs), a tensor, and backward where it has a gradient -> {kind: [launches, bytes]}.
    inputs: of their numbers nothing is read. The module's parameters lose theirs.
    """
    total, mode = {name: [0, 0] for name in KINDS}, FakeTensorMode()
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = None if p is None else torch.nn.Parameter(mode.from_tensor(p.detach()))
        for name, x in part._buffers.items():
            part._buffers[name] = None if x is None else mode.from_tensor(x)
    inputs = [mode.from_tensor(x) for x in inputs]
    with as_for_a_gpu(total), mode:
        with torch.autocast('cpu', torch.bfloat16, dtype == torch.bfloat16, cache_enabled=False):
            y = torch.compile(module, dynamic=False)(*inputs)
        if y.requires_grad:
            y.backward(torch.ones_like(y))
    return total


class Loss(torch.nn.Module):
    """A model that returns its loss alone."""
    def __init__(self, config):
        super().__init__()
        self.model = Hope(config)

    def forward(self, idx):
        return self.model(idx, idx)[1]


def count_model(config, B, T, dtype):
    """
    A step of B sequences of T tokens -> {kind: [launches, bytes]} of the whole model, and the same for one layer, the
    mean of a mix. Of as many layers as the mix has memories and of twice as many; all others are as the second ones.
    """
    few = len(config.mixer.split(','))
    once, twice = (count_step(Loss(replace(config, n_layer=n * few)), [torch.empty(B, T, dtype=torch.long)], dtype)
                   for n in (1, 2))
    layer = {name: [(b - a) / few for a, b in zip(once[name], twice[name])] for name in KINDS}
    whole = {name: [round(a + (config.n_layer - few) * b) for a, b in zip(once[name], layer[name])] for name in KINDS}
    return whole, layer
