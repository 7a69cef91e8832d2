"""The operations by C kernels (`cpu.c`) on CPUs with AVX512-BF16, and products with weights that are laid out once.

The kernels are compiled when they are first needed, by the C compiler that there is. They run outside of Python's lock,
so that each thread computes its own pass.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agnews_lora.paths import COMPILED
from agnews_lora.training.multilora.dropout import Mask, mixed
from agnews_lora.training.multilora.encoder import Affine, Layer, Norm
from agnews_lora.training.multilora.kernels import UnsuitableError
from agnews_lora.training.multilora.kernels.reference import Kernels, Lora, Saved
from agnews_lora.training.multilora.optimizer import BETAS, EPSILON, SlotSteps
from agnews_lora.training.multilora.packing import Rows, Segments
from agnews_lora.training.multilora.slots import Slots

SOURCE = Path(__file__).with_name("cpu.c")
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
OPTIONS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-mfma")
COMPILE_SECONDS = 120
STRIP = 32  # widths are multiples of it: bf16 in a vector register
RANKS = 8  # ranks are multiples of it
ROWS = 416  # for which the library lays out weights: any number of rows is multiplied with them


# The library ----------------------------------------------------------------------------------------------------------


@cache
def library() -> ctypes.CDLL:
    """Load the kernels, compiled before if need be.

    Raises:
        UnsuitableError: no such CPU, no compiler, or it failed.
    """
    loaded = load(build(compiler()))
    _keep_freed_memory()
    return loaded


def _keep_freed_memory() -> None:
    """Let the C library keep what a pass frees for the next one.

    It would give memory of this size back to the system, and a tenth of a pass would go into getting it again, page by
    page. Memory in use, which is what limits a sweep, peaks as before.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if set_option is not None:
        for option, value in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD; M_MMAP_THRESHOLD, at its largest
            set_option(option, value)


def compiler() -> list[str]:
    """Find the command of the C compiler: `CC`, or the first of cc, gcc and clang.

    Raises:
        UnsuitableError: there is none, or the CPU lacks an instruction.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UnsuitableError(f"the C kernels are for Linux on x86-64, not {sys.platform} on {platform.machine()}")
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError as error:
        raise UnsuitableError(f"the CPU's instructions are unknown ({error})") from error
    if missing := [name for name in INSTRUCTIONS if name not in flags]:
        raise UnsuitableError(f"the CPU has no {missing[0]}")
    if chosen := os.environ.get("CC"):
        try:
            return shlex.split(chosen)
        except ValueError as error:
            raise UnsuitableError(f"CC={chosen} is no command ({error})") from error
    if found := next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None):
        return [found]
    raise UnsuitableError("there is no C compiler (cc, gcc or clang)")


def build(command: Sequence[str]) -> Path:
    """Compile the kernels below `COMPILED`, unless the same compiler has done so before.

    Raises:
        UnsuitableError: the compiler or the folder fails.
    """
    options = [*OPTIONS, *(f"-m{name.replace('_', '')}" for name in INSTRUCTIONS)]
    try:
        version = subprocess.run(
            [*command, "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS
        ).stdout
        parts = [SOURCE.read_bytes(), version, *map(str.encode, [*command, *options])]
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()
        target = COMPILED / f"cpu-{key[:32]}.so"
        if target.exists():
            return target
        COMPILED.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=COMPILED) as folder:  # for the compiler's own temporary files as well
            made = Path(folder, target.name)
            subprocess.run(
                [*command, *options, str(SOURCE), "-o", str(made), "-lm"],
                env={**os.environ, "TMPDIR": str(Path(folder).resolve())},
                capture_output=True,
                check=True,
                timeout=COMPILE_SECONDS,
            )
            made.replace(target)  # whole at once: other processes may be at the same place
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").split("\n")
        raise UnsuitableError(
            f"{command[0]} failed ({next(filter(None, said), f'exit code {error.returncode}')})"
        ) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise UnsuitableError(f"the C kernels cannot be compiled ({error})") from error
    return target


def load(path: Path) -> ctypes.CDLL:
    """Load compiled kernels and declare their arguments.

    Raises:
        UnsuitableError: the system cannot load the file.
    """
    try:
        loaded = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise UnsuitableError(f"the compiled kernels cannot be loaded ({error})") from error
    matrix = [c_void_p, c_int64]  # with its row step
    groups, masks, steps, rows = POINTER(_Groups), POINTER(_Masks), POINTER(c_int64), POINTER(_Rows)
    declared: dict[str, list[Any]] = {
        "lora_down": [*matrix, c_void_p, groups, masks, c_void_p],
        "lora_up": [*matrix, c_void_p, c_void_p, groups],
        "lora_up_gradients": [*matrix, c_void_p, c_void_p, groups, c_void_p, c_void_p],
        "lora_down_gradients": [*matrix, c_void_p, *matrix, c_void_p, groups, masks, c_void_p],
        "gelu": [c_void_p, c_void_p, c_void_p, c_int64],
        "multiply": [c_void_p, c_void_p, c_int64],
        "add_norm": [*[c_void_p] * 4, c_float, *[c_void_p] * 3, c_int64, c_int32],
        "add_norm_gradient": [*[c_void_p] * 6, c_int64, c_int32],
        "adamw": [*[c_void_p] * 5, *[c_int64] * 2, c_void_p, *[c_int64] * 2, *[c_void_p] * 3, *[c_float] * 5, c_void_p],
        "attention": [*[c_void_p] * 3, steps, rows, c_void_p, c_void_p],
        "attention_gradients": [*[c_void_p] * 5, steps, rows, *[c_void_p] * 3],
    }
    with_memory = ("lora_up", "lora_up_gradients", "lora_down_gradients", "attention", "attention_gradients")
    for name, arguments in declared.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = None
        if name in with_memory:
            function.restype = c_int32
            function.errcheck = _check_memory
    return loaded


def _check_memory(result: int, function: Any, arguments: Any) -> None:
    if result:
        raise MemoryError("Cannot allocate the memory of a CPU kernel. Give the process more memory.")


class _Groups(Structure):
    _fields_ = (
        ("num_modules", c_int32),
        ("num_segments", c_int32),
        ("rank", c_int32),
        ("width", c_int32),
        ("ends", POINTER(c_int64)),
        ("adapts", POINTER(c_int32)),
    )


class _Masks(Structure):
    _fields_ = (
        ("tokens", c_void_p),
        ("pairs", c_void_p),
        ("salts", POINTER(c_int32)),
        ("drops", POINTER(c_int32)),
        ("bounds", c_void_p),
    )


class _Rows(Structure):
    _fields_ = (
        ("offsets", c_void_p),
        ("num_rows", c_int32),
        ("longest", c_int32),
        ("num_heads", c_int32),
        ("size", c_int32),
        ("first_only", c_int32),
        ("scale", c_float),
    )


# The operations -------------------------------------------------------------------------------------------------------


class _Projected(NamedTuple):
    """h or its gradient, and what the kernels are told of the stacks a and b, and of the dropout."""

    values: Tensor
    a: Any
    b: Any
    masks: Any


class _Attended(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    shares: Tensor
    of_rows: bool


class _Normed(NamedTuple):
    normal: Tensor
    rstd: Tensor


class _Slope(NamedTuple):
    slope: Tensor


class CpuKernels(Kernels):
    """The operations in bf16 by C kernels. Tensors that they do not take go the way of plain torch.

    Raises:
        UnsuitableError: no kernels for these layers or this machine.
    """

    name = "AVX512-BF16"

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        super().__init__(layers)
        widths = {size for layer in layers for size in layer.ffn_in.weight.shape}
        self.size = layers[0].query.weight.shape[1] // self.num_heads
        if dtype != torch.bfloat16:
            raise UnsuitableError("the pass is not in bf16")
        if other := [size for size in (self.size, *sorted(widths)) if size % STRIP]:
            raise UnsuitableError(f"heads and layers must be multiples of {STRIP} wide, but one is {other[0]}")
        self.library = library()
        self.pairs = {width: mixed(torch.arange(width // 2, dtype=torch.int32)) for width in widths}
        norms = [norm for layer in layers for norm in (layer.attention_norm, layer.ffn_norm)]
        self.norms = {norm: (norm.weight.float(), norm.bias.float()) for norm in norms}
        affines = [layer.query_key_value for layer in layers[:-1]] + [layers[-1].query, layers[-1].key_value]
        affines += [affine for layer in layers for affine in (layer.attention_output, layer.ffn_in, layer.ffn_out)]
        self.packed: dict[Affine, tuple[Tensor, Tensor]] = {}
        if torch.backends.mkldnn.is_available():
            for affine in affines:
                weight = affine.weight
                self.packed[affine] = (_packed(weight), _packed(weight.t().contiguous()))

    def linear(self, x: Tensor, affine: Affine) -> Tensor:
        if affine not in self.packed:
            return super().linear(x, affine)
        return _multiply(x, self.packed[affine][0], affine.bias)

    def linear_gradient(self, g: Tensor, affine: Affine) -> Tensor:
        if affine not in self.packed:
            return super().linear_gradient(g, affine)
        return _multiply(g, self.packed[affine][1], None)

    def lora_down(self, x: Tensor, lora: Lora, segments: Segments, mask: Mask | None) -> Saved:
        if not (_takes(x) and _takes_lora(lora)):
            return super().lora_down(x, lora, segments, mask)
        a, b = (byref(_groups(stack, lora, segments)) for stack in (lora.a, lora.b))
        h = x.new_empty(x.shape[0], *lora.a.shape[::2])
        masks = byref(self._masks(lora, mask))
        self.library.lora_down(*_matrix(x), _at(lora.a), a, masks, _at(h))
        return _Projected(h, a, b, masks)

    def lora_up(self, out: Tensor, h: Saved, lora: Lora, segments: Segments) -> None:
        if not isinstance(h, _Projected):
            return super().lora_up(out, h, lora, segments)
        assert _takes(out)
        self.library.lora_up(*_matrix(out), _at(h.values), _at(lora.b), h.b)

    def lora_up_gradients(self, g: Tensor, h: Saved, lora: Lora, segments: Segments) -> Saved:
        if not isinstance(h, _Projected):
            return super().lora_up_gradients(g, h, lora, segments)
        assert _takes(g)
        of_h = torch.empty_like(h.values)
        self.library.lora_up_gradients(*_matrix(g), _at(h.values), _at(lora.b), h.b, _at(of_h), _at(lora.of_b))
        return h._replace(values=of_h)

    def lora_down_gradients(
        self, of_x: Tensor | None, of_h: Saved, x: Tensor, lora: Lora, segments: Segments, mask: Mask | None
    ) -> None:
        if not isinstance(of_h, _Projected):
            return super().lora_down_gradients(of_x, of_h, x, lora, segments, mask)
        assert of_x is None or _takes(of_x)
        target = (None, 0) if of_x is None else _matrix(of_x)
        self.library.lora_down_gradients(
            *target, _at(of_h.values), *_matrix(x), _at(lora.a), of_h.a, of_h.masks, _at(lora.of_a)
        )

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, of_rows: bool, training: bool
    ) -> tuple[Tensor, Saved]:
        if not all(map(_takes, (q, k, v))):
            return super().attention(q, k, v, rows, of_rows, training)
        context = torch.empty(q.shape, dtype=q.dtype)
        room = -(-rows.longest // STRIP) * STRIP
        shares = q.new_empty(len(q), self.num_heads, room) if training else None
        steps = (c_int64 * 4)(*(each.stride(0) for each in (q, k, v, context)))
        self.library.attention(*map(_at, (q, k, v)), steps, self._rows(rows, of_rows), _at(context), _at(shares))
        if not of_rows:
            context[rows.total :] = 0.0
        return context, None if shares is None else _Attended(q, k, v, shares, of_rows)

    def attention_gradients(
        self, g: Tensor, saved: Saved, rows: Rows, of_q: Tensor, of_k: Tensor, of_v: Tensor
    ) -> None:
        if not isinstance(saved, _Attended):
            return super().attention_gradients(g, saved, rows, of_q, of_k, of_v)
        q, k, v, shares, of_rows = saved
        assert all(map(_takes, (g, of_q, of_k, of_v))), "gradients of what the kernel computed"
        steps = (c_int64 * 7)(*(each.stride(0) for each in (q, k, v, g, of_q, of_k, of_v)))
        self.library.attention_gradients(
            *map(_at, (g, q, k, v, shares)), steps, self._rows(rows, of_rows), *map(_at, (of_q, of_k, of_v))
        )
        for each in (of_k, of_v) if of_rows else (of_q, of_k, of_v):
            each[rows.total :] = 0.0

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm, training: bool) -> tuple[Tensor, Saved]:
        if norm not in self.norms or not all(_takes(each) and each.is_contiguous() for each in (x, y)):
            return super().add_norm(x, y, norm, training)
        weight, bias = self.norms[norm]
        out, normal, rstd = torch.empty_like(x), None, None
        if training:
            normal, rstd = torch.empty_like(x), weight.new_empty(len(x))
        self.library.add_norm(*map(_at, (x, y, weight, bias)), norm.epsilon, *map(_at, (out, normal, rstd)), *x.shape)
        return out, None if normal is None or rstd is None else _Normed(normal, rstd)

    def add_norm_gradient(self, g: Tensor, g2: Tensor | None, saved: Saved, norm: Norm) -> Tensor:
        if not isinstance(saved, _Normed):
            return super().add_norm_gradient(g, g2, saved, norm)
        g, g2 = g.contiguous(), None if g2 is None else g2.contiguous()
        weight, of_sum = self.norms[norm][0], torch.empty_like(g)
        self.library.add_norm_gradient(*map(_at, (g, g2, saved.normal, saved.rstd, weight, of_sum)), *g.shape)
        return of_sum

    def gelu(self, z: Tensor, training: bool) -> tuple[Tensor, Saved]:
        if not (_takes(z) and z.is_contiguous()):
            return super().gelu(z, training)
        u = torch.empty_like(z)
        self.library.gelu(_at(z), _at(u), _at(z) if training else None, z.numel())  # the slope takes the place of z
        return u, _Slope(z) if training else None

    def gelu_gradient(self, g: Tensor, saved: Saved) -> Tensor:
        if not isinstance(saved, _Slope):
            return super().gelu_gradient(g, saved)
        g = g.contiguous()
        self.library.multiply(_at(g), _at(saved.slope), g.numel())
        return g

    def adamw(self, slots: Slots, gradients: Tensor, steps: SlotSteps, weight_decay: float, max_norm: float) -> Tensor:
        state = slots.weights, slots.first_moment, slots.second_moment
        assert all(each.is_contiguous() for each in (*state, gradients))
        norms = gradients.new_empty(len(slots))
        self.library.adamw(
            *map(_at, (*state, gradients, slots.decays)), *gradients.shape,
            _at(slots.frozen), slots.freezable.start, slots.freezable.stop,
            *map(_at, (steps.learning_rates, steps.first_corrections, steps.second_corrections)),
            *BETAS, EPSILON, weight_decay, max_norm, _at(norms),
        )  # fmt: skip
        return norms

    def _masks(self, lora: Lora, mask: Mask | None) -> _Masks:
        if mask is None:
            return _Masks()
        assert mask.tokens.is_contiguous() and mask.bounds.is_contiguous()
        salts = [mask.salt + module for module in lora.modules]
        return _Masks(
            _at(mask.tokens),
            _at(self.pairs[lora.a.shape[3]]),
            (c_int32 * len(salts))(*salts),
            (c_int32 * len(mask.drops))(*mask.drops),
            _at(mask.bounds),
        )

    def _rows(self, rows: Rows, of_rows: bool) -> Any:
        numbers = len(rows.first), rows.longest, self.num_heads, self.size, of_rows, self.size**-0.5
        return byref(_Rows(_at(rows.offsets), *numbers))


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    return packed


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _takes(x: Tensor) -> bool:
    """Whether the kernels read a matrix: bf16 on the CPU, whole registers in a row, columns side by side."""
    whole = x.stride(1) == 1 and x.shape[1] % STRIP == 0 and x.stride(0) % 2 == 0
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and whole


def _takes_lora(lora: Lora) -> bool:
    stacks = [each for each in (lora.a, lora.b, lora.of_a, lora.of_b) if each is not None]
    whole = all(each.is_contiguous() and each.shape[2] % RANKS == 0 and each.shape[3] % STRIP == 0 for each in stacks)
    return whole and lora.a.dtype == torch.bfloat16 and lora.flags.is_contiguous()


def _groups(stack: Tensor, lora: Lora, segments: Segments) -> _Groups:
    modules, count, rank, width = stack.shape
    ends = (c_int64 * count)(*(part.stop for part in segments.parts))
    adapts = (c_int32 * (modules * count))(*(flag for flags in lora.adapts for flag in flags))
    return _Groups(modules, count, rank, width, ends, adapts)


def _matrix(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.stride(0)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
