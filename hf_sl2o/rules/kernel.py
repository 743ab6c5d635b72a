"""A rule's step over many coordinates in one pass, where there is a kernel for it; elsewhere torch does it.

On a CPU the kernels are `lstm_kernel.cpp` and `tensor_sums.cpp`, on CUDA `triton_kernel`: they read and write each
number that is kept of a coordinate once, and keep nothing between. [`Rule.forward`] is what they are tested against,
and what has a gradient. `HF_SL2O_NATIVE=0` keeps to it.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..foundation.native import SWITCH, load_native
from .config import CEASED, ROUNDING, RuleConfig

if TYPE_CHECKING:
    from .rule import Rule, RuleState

logger = logging.getLogger(__name__)

SOURCE, SUMS = Path(__file__).with_name("lstm_kernel.cpp"), Path(__file__).with_name("tensor_sums.cpp")
#: Fewer coordinates are left to torch: there is little to gain, and a first use compiles.
LEAST = 1 << 13
_MOST_COLUMNS, _MOST_UNITS = 32, 64  # of lstm_kernel.cpp


class Network(NamedTuple):
    """What a kernel computes from a coordinate's columns."""

    layers: int  # of an LSTM; 0: a mix of the columns, whose numbers each tensor has
    size: int  # of the LSTM
    weights: torch.Tensor  # (W,) of each layer and unit: bias, columns, hidden, each for the four gates; then the head
    largest: float = 1.0  # what a mix is bounded by


class Numbers(NamedTuple):
    """The numbers of one step that all coordinates share, and those of each tensor: fp32, on the rule's device."""

    corrections: torch.Tensor  # (2 + j,) 1 / (1 - beta^t) of m, v and each further momentum
    share: torch.Tensor  # () the column `progress`
    cell_factor: torch.Tensor  # () 0 where the cell begins anew
    of_tensor: torch.Tensor  # (k, o) rounding, scale, then the cosine; or the length, and the mix


def fused_update_(
    rule: Rule,
    g: torch.Tensor,
    state: RuleState,
    tensors: torch.Tensor,
    *,
    sizes: Sequence[int] | None,
    finite: torch.Tensor | None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    total_steps: float | None = None,
) -> bool:
    """Does what [`Rule.update_`] does to `g` and to what `state` keeps of coordinates, if there is a kernel for it.

    Args:
        rule ([`Rule`]): Kinds, hooks and sizes that the kernel does not know are left to torch.
        g, state, sizes, finite, betas, eps, total_steps: As for [`Rule.update_`].
        tensors (`torch.Tensor` of shape `(k, o)`): From [`Rule.tensor_step`].

    Returns:
        Whether it was done; if not, nothing has changed.
    """
    sizes = [g.numel()] if sizes is None else list(sizes)
    if not _known(rule, g, state, tensors, sizes) or (rule.config.progress and not total_steps):
        return False
    config = rule.config
    decays = [*((config.beta1, config.beta2) if betas is None else betas), *config.momenta]
    eps = config.eps if eps is None else eps
    if any(not isinstance(number, int | float) for number in (*decays, eps, total_steps or 0)):
        return False  # tensors, say
    network = rule.for_kernel()
    if network is None or network.weights.dtype != torch.float32:
        return False
    on_device = _is_for_triton(g)
    kernel = _triton(rule, network, g) if on_device else _library()
    if kernel is None:
        return False
    if finite is not None and not on_device and not bool(finite):
        g.zero_()
        return True
    numbers = step_numbers(config, state, tensors, decays, eps, total_steps)
    if on_device:
        kernel.launch(config, network, numbers, g, state, sizes=sizes, finite=finite, decays=decays, eps=eps)
    else:
        # The tensors whose addresses the kernel is given: they live until it is done.
        step, _kept = _step(config, network, numbers, g, state, decays, eps, sizes)
        if kernel.rule_step(ctypes.byref(step)):
            return False
    torch.autograd.graph.increment_version([g, *state[1:-1]])
    return True


def _is_for_triton(g: torch.Tensor) -> bool:
    return g.is_cuda


def _known(rule: Rule, g: torch.Tensor, state: RuleState, tensors: torch.Tensor, sizes: list[int]) -> bool:
    """Whether a kernel can take these tensors as they are."""
    if torch.compiler.is_compiling() or g.device.type not in ("cpu", "cuda") or g.numel() < LEAST or state.step.ndim:
        return False
    n, fp32 = g.numel(), torch.float32
    bf16 = state.exp_avg.dtype == torch.bfloat16
    plain = [g, state.step, state.exp_avg_sq, state.hidden, state.cell, state.momenta, tensors]
    plain += [] if bf16 else [state.exp_avg]
    every = [*plain, state.exp_avg]
    return (
        all(type(tensor) is torch.Tensor and tensor.dtype == fp32 for tensor in plain)
        and all(t.is_contiguous() and t.device == g.device and not t.is_neg() for t in every)
        and all(len(tensor) == n for tensor in state[1:-1])
        and sum(sizes) == n
        and len(sizes) == len(tensors)
        and rule.config.input_size <= _MOST_COLUMNS
        and rule.config.hidden_size <= _MOST_UNITS
        # A hook of a user's wants to see a call
        and not any(module._forward_hooks or module._forward_pre_hooks for module in rule.modules())
    )


def step_numbers(
    config: RuleConfig,
    state: RuleState,
    tensors: torch.Tensor,
    decays: Sequence[float],
    eps: float,
    total_steps: float | None,
) -> Numbers:
    """The numbers of one step, with the operations of [`Rule.forward`], so that they round alike.

    Args:
        config, state, eps, total_steps: As for [`Rule.forward`]; `state` is that before the step.
        tensors (`torch.Tensor` of shape `(k, o)`): From [`Rule.tensor_step`].
        decays (`Sequence[float]`): Of m, v and each further momentum.
    """
    step = state.step + 1  # ()
    exponent = step + config.bias_correction_offset
    corrections = torch.stack([1 / (1 - beta**exponent) for beta in decays])
    share = torch.zeros_like(step)
    if config.progress and total_steps:
        share = 2 * (state.step / total_steps).clamp_max(1.0) - 1
    cell_factor = torch.ones_like(step)
    if config.reset_cell_every:
        cell_factor = ((step - 1) % config.reset_cell_every != 0).to(step.dtype)
    rounding = eps**2 + (ROUNDING * tensors[:, :1]).square()  # (k, 1)
    of_tensor = torch.cat([rounding, tensors[:, :1] + eps, tensors[:, 1:]], dim=1)
    return Numbers(corrections, share, cell_factor, of_tensor.contiguous())


def fused_sums(
    g: torch.Tensor, vectors: Sequence[torch.Tensor], exp_avg_sq: torch.Tensor, sizes: Sequence[int]
) -> list[torch.Tensor] | None:
    """Sums over the k tensors in the flat `g`, in one pass, if there is a kernel for it.

    Args:
        g, exp_avg_sq (`torch.Tensor` of shape `(N,)`): The gradient, and v.
        vectors (`Sequence[torch.Tensor]`): j more, each `(N,)`; fp32, or bf16.
        sizes (`Sequence[int]`): Of the tensors.

    Returns:
        2 + 2 j times `(k,)`, fp64: of each tensor the sum of g^2, of v, and for each vector a of g a and of a^2. None:
        torch has to do it.
    """
    every = [g, exp_avg_sq, *vectors]
    if torch.compiler.is_compiling() or g.device.type != "cpu" or g.numel() < LEAST or sum(sizes) != g.numel():
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in every):
        return None
    plain = (
        all(type(tensor) is torch.Tensor and tensor.shape == g.shape and not tensor.is_neg() for tensor in every)
        and all(tensor.device.type == "cpu" for tensor in every)
        and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in (g, exp_avg_sq))
        and all(
            tensor.dtype == torch.float32 or (tensor.dtype == torch.bfloat16 and tensor.is_contiguous())
            for tensor in vectors
        )
    )
    library = _sums_library() if plain else None
    if library is None:
        return None
    counts = torch.tensor(sizes, dtype=torch.int64)
    found = [torch.empty(len(sizes), dtype=torch.float64) for _ in range(2 + 2 * len(vectors))]
    columns = (ctypes.c_void_p * len(found))(*(column.data_ptr() for column in found))
    of = [_Vector(vector.data_ptr(), vector.stride(0), vector.dtype == torch.bfloat16) for vector in vectors]
    done = library.tensor_sums(
        g.data_ptr(), exp_avg_sq.data_ptr(), (_Vector * len(of))(*of), len(of), counts.data_ptr(), len(sizes),
        torch.get_num_threads(), columns,
    )  # fmt: skip
    return None if done else found


class _Vector(ctypes.Structure):
    """`Vector` of lstm_kernel.cpp."""

    _fields_ = [("numbers", ctypes.c_void_p), ("stride", ctypes.c_int64), ("is_bf16", ctypes.c_int64)]


class _Step(ctypes.Structure):
    """`Step` of lstm_kernel.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("g", "v", "hidden", "cell", "momenta", "m", "sizes", "of_tensor")),
        *((name, ctypes.c_void_p) for name in ("weights", "corrections", "betas")),
        *((name, ctypes.c_int64) for name in ("tensors", "per_tensor", "threads", "layers", "size", "further")),
        *((name, ctypes.c_int64) for name in ("stride", "columns", "m_is_bf16", "normalized", "tensor_scale")),
        *((name, ctypes.c_int64) for name in ("progress", "agreement", "squash")),
        *((name, ctypes.c_float) for name in ("eps", "share", "log_sign", "log_sign_exp", "cell_factor")),
        *((name, ctypes.c_float) for name in ("output_scale", "ceased", "largest")),
    ]


def _step(
    config: RuleConfig,
    network: Network,
    numbers: Numbers,
    g: torch.Tensor,
    state: RuleState,
    decays: Sequence[float],
    eps: float,
    sizes: list[int],
) -> tuple[_Step, list[torch.Tensor]]:
    """The argument of `rule_step`, and the tensors that it has the addresses of and nobody else holds."""
    counts = torch.tensor(sizes, dtype=torch.int64)
    betas = torch.tensor(decays, dtype=torch.float32)
    weights = network.weights.detach().contiguous()
    step = _Step(
        g=g.data_ptr(),
        v=state.exp_avg_sq.data_ptr(),
        hidden=state.hidden.data_ptr(),
        cell=state.cell.data_ptr(),
        momenta=state.momenta.data_ptr(),
        m=state.exp_avg.data_ptr(),
        sizes=counts.data_ptr(),
        of_tensor=numbers.of_tensor.data_ptr(),
        weights=weights.data_ptr(),
        corrections=numbers.corrections.data_ptr(),
        betas=betas.data_ptr(),
        tensors=len(sizes),
        per_tensor=numbers.of_tensor.shape[1],
        threads=torch.get_num_threads(),
        layers=network.layers,
        size=network.size,
        further=len(config.momenta),
        stride=state.momenta.shape[1],
        columns=config.input_size,
        m_is_bf16=state.exp_avg.dtype == torch.bfloat16,
        normalized=config.inputs == "normalized",
        tensor_scale=config.tensor_scale,
        progress=config.progress,
        agreement=config.agreement,
        squash=config.squash,
        eps=eps,
        share=float(numbers.share),
        log_sign=config.log_sign or 0.0,
        log_sign_exp=math.exp(config.log_sign or 0.0),
        cell_factor=float(numbers.cell_factor),
        output_scale=config.output_scale,
        ceased=CEASED,
        largest=network.largest,
    )
    return step, [counts, betas, weights, *numbers]


def _library() -> ctypes.CDLL | None:
    library = load_native(SOURCE)
    if library is not None and library.rule_step.argtypes is None:
        library.size_of_step.restype, library.size_of_step.argtypes = ctypes.c_int64, []
        if library.size_of_step() != ctypes.sizeof(_Step):
            raise RuntimeError(f"{SOURCE.name} and kernel.py have another Step; install hf_sl2o anew")
        library.rule_step.restype, library.rule_step.argtypes = ctypes.c_int, [ctypes.POINTER(_Step)]
    return library


def _sums_library() -> ctypes.CDLL | None:
    library = load_native(SUMS)
    if library is not None and library.tensor_sums.argtypes is None:
        address, count = ctypes.c_void_p, ctypes.c_int64
        library.tensor_sums.restype = ctypes.c_int
        library.tensor_sums.argtypes = [
            address, address, ctypes.POINTER(_Vector), count, address, count, count, ctypes.POINTER(address)
        ]  # fmt: skip
    return library


_agreed: dict[tuple[RuleConfig, torch.device], bool] = {}


def _triton(rule: Rule, network: Network, g: torch.Tensor) -> ModuleType | None:
    """The Triton kernel, if it has this network, and has shown on this device that it does what torch does."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        from . import triton_kernel
    except ImportError:  # comes with torch's CUDA builds for Linux
        return None
    if network.layers and (network.layers, network.size) != (1, triton_kernel.UNITS):
        return None
    key = (rule.config, g.device)
    if key not in _agreed:
        if g.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # what is compared is read back
        try:
            _agreed[key] = agrees(rule, network, triton_kernel, g.device)
            reason = "it computes something else than torch"
        except Exception as error:  # a compiler, a driver: torch does the work all the same
            _agreed[key], reason = False, f"{type(error).__name__}: {error}"
        if not _agreed[key]:
            logger.warning(
                "the Triton kernel of the rule is not used on %s (%s): torch does its work", g.device, reason
            )
    return triton_kernel if _agreed[key] else None


def agrees(rule: Rule, network: Network, module: ModuleType, device: torch.device) -> bool:
    """Whether three steps of some coordinates by the Triton kernel are those of torch, but for rounding."""
    config, sizes = rule.config, (300, 1, 211)
    n, total_steps = sum(sizes), 5.0
    weights = [torch.ones(size, device=device) for size in sizes]
    ours, state = (rule.init_state(n, device=device, weights=weights) for _ in range(2))
    decays = [config.beta1, config.beta2, *config.momenta]
    tolerance = 1e-2 if ours.exp_avg.dtype == torch.bfloat16 else 1e-4  # a last digit decides how m is rounded
    wave = torch.arange(n, device=device)
    of_each = torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))
    for step in range(3):
        g = torch.sin(wave * (step + 1.0)) * torch.exp(-wave / 40)
        found, kept = rule.tensor_step(rule.tensor_inputs(g, state, sizes), state.tensors)
        expected, following = rule(g, state, of_tensor=found[of_each], total_steps=total_steps)
        numbers = step_numbers(config, ours, found, decays, config.eps, total_steps)
        module.launch(config, network, numbers, g, ours, sizes=sizes, finite=None, decays=decays, eps=config.eps)
        ours, state = ours._replace(step=following.step, tensors=kept), following._replace(tensors=kept)
        pairs = [(g, expected), (ours.hidden, state.hidden), (ours.cell, state.cell), (ours.momenta, state.momenta)]
        for a, b in pairs:
            if b.numel() and not bool(((a - b).abs() <= tolerance * (b.abs() + b.abs().mean())).all()):
                return False
    return True
