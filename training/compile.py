"""Faster code for the same numbers: torch.compile, kernels, and optimizer steps replayed as CUDA graphs."""

import contextlib
import functools

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from configure import UserError
from training.device import is_compiled
from training.distributed import world_size
from training.kernel_check import kernels_that_agree


def fall_back_or_raise(name, config, error, say):
    """Says that setting `name` does not work here; raises UserError where it was asked for."""
    reason = f"{name}: fails here ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    if getattr(config, name) != "auto":
        raise UserError(f"{reason}; try --{name}=false") from None
    say(f"{reason}; running without")


def methods_to_compile(model, config, device):
    """[(module, method name)] that training runs compiled: none, the whole forward pass, or its parts."""
    if not is_compiled(config, device):
        return []
    if config.compile == "model":
        return [(model, "forward")]
    methods = [*((block, "forward") for block in model.blocks), (model, "read_out")]
    if device.type != "cpu":  # there its backward pass adds in any order: a resumed run would have other bits
        methods.append((model, "embed"))
    return methods


def compile_for_training(method):
    """`method`, compiled where gradients are on: evaluation's shapes would each be compiled anew."""
    fast = torch.compile(method, dynamic=False)

    def call(*args, **options):
        if torch.is_grad_enabled():
            return fast(*args, **options)
        return method(*args, **options)

    return call


def allow_recompiling():
    """Compiled code is kept for every shape that a sweep trains."""
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 10_000


@contextlib.contextmanager
def compiled_training(model, parallel_model, config, device, autocast, say):
    """Within, training of `model` goes through torch.compile, where config.compile asks for it and it works.

    All blocks share one compiled code, or with a window two. "model" compiles the whole pass as one: it takes
    longer, for a faster step. On a GPU, in bf16, kernels take the place of three functions of model.py.
    parallel_model: `model`, or what distributed.parallelize() made of it. Raises UserError.
    """
    allow_recompiling()
    methods = methods_to_compile(model, config, device)
    with contextlib.ExitStack() as changes:
        if methods and can_use_flex(config, device):
            attend = attend_by_flex(band_mask(config.window, config.context, device), config.context,
                                    model.blocks[0].attention.attend)
            for block in model.blocks[1::2]:
                changes.enter_context(replaced(block.attention, "attend", attend))
        if methods and device.type == "cuda" and autocast._enabled:
            for module, name, kernel in kernels_that_agree(model, config, say):
                changes.enter_context(replaced(module, name, kernel))
        for module, name in methods:
            changes.enter_context(replaced(module, name, compile_for_training(getattr(module, name))))
        if methods:
            if device.type == "cpu":
                say("compiling: half a minute the first time, unless --compile=false")
            error = try_one_pass(model, parallel_model, config, device, autocast)
            if error is not None:
                changes.close()
                fall_back_or_raise("compile", config, error, say)
        yield


@contextlib.contextmanager
def replaced(module, name, value):
    """Within, module.name is `value`; afterwards again what the module or its class has."""
    own = {key: old for key, old in module.__dict__.items() if key == name}
    setattr(module, name, value)
    try:
        yield
    finally:
        module.__dict__.pop(name)
        module.__dict__.update(own)


def can_use_flex(config, device):
    """Whether blocks with a window go through FlexAttention (arXiv 2412.05496), which skips what lies outside
    of it. It is code that torch.compile makes for a GPU; it knows no dropout and no smaller heads."""
    return (config.window is not None and device.type == "cuda" and config.dropout == 0
            and config.head_dim >= 16)


def attend_by_flex(mask, context, plain):
    """Attention.attend by FlexAttention, in training, where all `context` tokens are there; else `plain`."""
    def attend(q_BHTD, k_BHSD, v_BHSD, mask_TS=None, **options):
        if not torch.is_grad_enabled() or q_BHTD.size(2) != context:
            return plain(q_BHTD, k_BHSD, v_BHSD, mask_TS, **options)
        return flex_attention(q_BHTD, k_BHSD, v_BHSD, block_mask=mask, scale=1.0,
                              enable_gqa=q_BHTD.size(1) != k_BHSD.size(1))

    return attend


@functools.lru_cache(maxsize=8)  # the same object for each trial of a shape: another would be compiled anew
def band_mask(window, context, device):
    """The BlockMask of the blocks that attend to the latest `window` tokens."""
    def is_seen(b, h, query, key):
        return (query >= key) & (query - key < window)

    return create_block_mask(is_seen, None, None, context, context, device=device)


def try_one_pass(model, parallel_model, config, device, autocast):
    """Compile, by a forward and backward pass that changes nothing. Returns the exception that it ends in."""
    rows = config.pass_batch(world_size())
    # Two tensors, as in training: code for one that is both would serve no step, and compile again
    batch = torch.zeros(2, rows, config.context, dtype=torch.long).to(device)

    def pass_once():
        with autocast:
            parallel_model(*batch).backward()

    try:
        try:
            pass_once()
        except LookupError:
            # Dynamo, explaining why an earlier model's code does not serve, looks for modules that only that
            # model has. Nothing to explain without that code
            torch._dynamo.reset()
            pass_once()
        return None
    except Exception as error:  # whatever a missing compiler or an unsupported GPU raises
        return error
    finally:
        for leaf in (*model.parameters(), *model.buffers()):
            leaf.grad = None


def use_cuda_graph(config, device):
    """Whether the step is to be one CUDA graph. Raises UserError where that is asked for but impossible."""
    possible = device.type == "cuda" and world_size() == 1 and not config.shard
    if config.graph is True and not possible:
        raise UserError("graph must be false, except on one GPU with --shard=false, got True")
    return possible and config.graph is not False


class CudaGraphed:
    """`function`, of one tensor, which returns one tensor, replayed as a CUDA graph: one launch in place of
    hundreds. Where not `enabled`, it is just called.

    The first two calls run plainly, as they compile kernels and allocate memory, which a graph cannot
    contain. The third is captured; from then on a call copies its argument into the graph's and replays.
    An argument of another shape, as where the batch ramps up, begins this anew and frees the graph before.
    on_failure(error) is called when the capture fails; the function then stays plain.
    """

    def __init__(self, function, enabled, on_failure):
        self.function, self.enabled, self.on_failure = function, enabled, on_failure
        self.calls = 0  # with arguments of this shape
        self.shape = self.graph = self.input = self.output = None

    def __call__(self, x):
        if x.shape != self.shape:
            self.forget()
            self.calls, self.shape = 0, x.shape
        self.calls += 1
        if self.enabled and self.calls == 3:
            self.capture(x)
        if self.graph is None:
            return self.function(x)
        self.input.copy_(x)
        self.graph.replay()
        return self.output.clone()  # the next replay overwrites it

    def forget(self):
        """Free the graph, if there is one, and its memory."""
        if self.graph is not None:
            torch.cuda.synchronize()  # it may be running
            self.graph = self.input = self.output = None
            torch.cuda.empty_cache()

    def capture(self, x):
        self.input, graph = torch.empty_like(x), torch.cuda.CUDAGraph()
        try:
            # thread_local: the thread that prefetches batches may pin memory meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.output = self.function(self.input)
            self.graph = graph
        except RuntimeError as error:
            self.on_failure(error)
            self.enabled = False
