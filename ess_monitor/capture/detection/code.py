"""Find out from a class's code whether its forward mixes tokens, without calling it.

What is looked for are the operations that read along the sequence: convolutions, Fourier transforms, scans, attention,
products of two activations, and loops over tokens that carry a state. Calls of the class's own methods and of functions
of its own library are followed. Code of torch's classes is not looked at.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections import deque
from collections.abc import Hashable, Iterator
from functools import cache
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ess_monitor.capture.detection.class_names import POINTWISE, looks_like_mixer

A_LOOP = "a loop over tokens"
_OPERATIONS = {
    "a convolution": re.compile(r"(causal_)?(short_)?(conv1d|conv_transpose1d)(_\w+)?|fft_?conv\w*|long_?conv\w*"),
    "a Fourier transform": re.compile(r"i?[rh]?fftn?"),
    "a scan": re.compile(
        r"(log)?cum(sum|prod|max|sumexp)|\w*associative_scan|\w*selective_scan\w*|accumulate|p?scan|\w+_scan(_\w+)?"
    ),
    "a shift of tokens": re.compile(r"roll"),
    "attention": re.compile(
        r"(_?(scaled_dot_product|flash|flex|memory_efficient|efficient|linear|local|eager)_attention(?!_mask)\w*"
        r"|flash_attn\w*|multi_head_attention_forward|ALL_ATTENTION_FUNCTIONS|\w*attention_forward)"
    ),
}
"""What a name in the code stands for."""
_KERNEL = re.compile(
    r"_?(torch_|mlstm_|slstm_)?(chunk|chunkwise|fused_recurrent|fused_chunk|parallel|recurrent|naive)_\w+"
)
"""Names of functions that compute a recurrence, as libraries of kernels call them."""
_PRODUCTS = frozenset(("matmul", "bmm", "baddbmm"))
_TURNS = frozenset(("transpose", "mT", "T", "permute", "swapaxes", "movedim", "rearrange", "swapdims", "t"))
_CUTS = frozenset(("unbind", "split", "chunk", "transpose", "permute", "movedim", "swapaxes"))
_SIZES = frozenset(("shape", "size"))
_NO_MIXING = re.compile(
    r"rotary|rope|mask|position|router|expert|moe|loss|init|reset|load_|save_|generate|prepare|cache|debug"
)
"""Functions of a layer that read or place tokens, and mix none of their features."""
_DEPTH = 5
"""Calls that are followed from forward."""
_SIZE = 400
"""Functions that are looked at for one class."""


class _Function(NamedTuple):
    code: CodeType
    globals: dict[str, Any]
    depth: int
    own: str
    """What it calls the instance; empty where it is no method of the class."""


def how_code_mixes(module: nn.Module) -> str:
    """Return what in a module's code mixes tokens, such as "a loop over tokens"; empty where nothing does.

    >>> class Ema(nn.Module):
    ...     def forward(self, x):
    ...         s = 0 * x[:, 0]
    ...         for t in range(x.shape[1]):
    ...             s = 0.9 * s + x[:, t]
    ...         return s
    >>> how_code_mixes(Ema()), how_code_mixes(nn.Linear(2, 2))
    ('a loop over tokens', '')
    """
    found = _of_class(cast(Hashable, type(module)), frozenset(_named_like_operations(module)))
    return found or next(filter(None, map(_of_attribute, vars(module).values())), "")


def _of_attribute(value: Any) -> str:
    """Look at a function that an instance holds, such as `partial(torch.fft.fftn, dim=(1, 2))`."""
    while isinstance(value, functools.partial):
        value = value.func
    if not isinstance(value, (FunctionType, BuiltinFunctionType)):
        return ""
    name = value.__name__.removeprefix("fft_")
    return next((kind for kind, names in _OPERATIONS.items() if names.fullmatch(name)), "")


def _named_like_operations(module: nn.Module) -> Iterator[str]:
    """Yield the attributes of a module that are called like an operation and are none: a `conv1d` of one tap."""
    for name, value in (*vars(module).items(), *module._parameters.items(), *module._modules.items()):
        if _is_called_like_operation(name) and _mixes_nothing(value):
            yield name


@cache
def _is_called_like_operation(name: str) -> bool:
    return any(names.fullmatch(name) for names in _OPERATIONS.values())


def _mixes_nothing(value: Any) -> bool:
    """Return whether an attribute is no function, or a module that is known to treat each token by itself."""
    if not isinstance(value, nn.Module):
        return not callable(value)
    if _is_torch(type(value).forward.__module__) and isinstance(value, nn.modules.conv._ConvNd):
        return set(value.kernel_size) == {1}
    parts = list(value.children())
    if type(value) in POINTWISE or not parts:
        return type(value) in POINTWISE
    is_known = isinstance(value, (nn.Sequential, nn.ModuleList)) or not (
        looks_like_mixer(type(value)) or how_code_mixes(value)
    )
    return is_known and all(map(_mixes_nothing, parts))


@cache
def _of_class(cls: Any, no_operations: frozenset[str]) -> str:
    forward = getattr(cls, "forward", None)
    forward = inspect.unwrap(forward) if callable(forward) else None
    if not isinstance(forward, FunctionType) or _is_torch(forward.__module__):
        return ""
    products, softmax, turns = 0, False, False
    for function in _reachable(cls, forward):
        names = set(_names(function.code))
        names -= {name for name in no_operations & names if _is_read_of(function.own, name, function.code)}
        for kind, operations in _OPERATIONS.items():
            if any(operations.fullmatch(name) for name in names):
                return kind
        if any(_KERNEL.fullmatch(name) and isinstance(function.globals.get(name), FunctionType) for name in names):
            return "a recurrence"
        if _loops_over_tokens(function.code):
            return A_LOOP
        products += _count_products(function.code)
        softmax |= "softmax" in names or "Softmax" in names
        turns |= not names.isdisjoint(_TURNS | {"einsum"})
    if products >= 2 and (softmax or turns):
        return "products of one token's features with another's" if not softmax else "attention"
    return ""


def _is_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] in ("torch", "builtins")


def _reachable(cls: Any, forward: FunctionType) -> Iterator[_Function]:
    """Yield forward and the functions that it calls, of the same class and the same library."""
    library = (forward.__module__ or "").partition(".")[0]
    waiting = deque([(forward, 0)])
    seen = {forward.__code__}
    while waiting and len(seen) < _SIZE:
        function, depth = waiting.popleft()
        is_method = isinstance(inspect.getattr_static(cls, function.__name__, None), FunctionType)
        yield _Function(function.__code__, function.__globals__, depth, _own_name(function.__code__) * is_method)
        if depth == _DEPTH:
            continue
        for name in _names(function.__code__):
            if _NO_MIXING.search(name.lower()):
                continue
            for value in (getattr(cls, name, None), function.__globals__.get(name)):
                if isinstance(value, type):  # a function with a backward pass of its own is called by `apply`
                    value = value.forward if issubclass(value, torch.autograd.Function) else None
                called = inspect.unwrap(value) if callable(value) else None
                called = getattr(called, "__func__", called)
                if not isinstance(called, FunctionType) or called.__code__ in seen:
                    continue
                if (called.__module__ or "").partition(".")[0] == library:
                    seen.add(called.__code__)
                    waiting.append((called, depth + 1))


def _is_read_of(own: str, name: str, code: CodeType) -> bool:
    """Return whether code takes a name from the instance alone, as in `self.name`."""
    for part in _codes(code):
        before: tuple[str, ...] = ()
        for instruction in dis.get_instructions(part):
            if instruction.argval == name and instruction.opname.startswith("LOAD") and before[-1:] != (own,):
                return False
            if instruction.opname not in ("CACHE", "NOP"):
                before = _locals(instruction, "LOAD")
    return bool(own)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _count_products(code: CodeType) -> int:
    """Count the products of two activations: neither factor is a parameter of the layer itself."""
    count = 0
    for part in _codes(code):
        instructions = list(dis.get_instructions(part))
        for k, instruction in enumerate(instructions):
            if (instruction.opname == "BINARY_OP" and instruction.argrepr in ("@", "@=")) or (
                instruction.opname == "BINARY_MATRIX_MULTIPLY"
            ):
                count += not _is_own_tensor(instructions[:k], _own_name(part))
            elif instruction.argval in _PRODUCTS and instruction.opname.startswith("LOAD"):
                count += 1
            elif instruction.argval == "einsum" and instruction.opname.startswith("LOAD"):
                equation = next((i.argval for i in instructions[k + 1 : k + 4] if isinstance(i.argval, str)), "")
                count += _mixes_positions(equation)
    return count


def _is_own_tensor(before: list[dis.Instruction], own: str) -> bool:
    """Return whether the last value on the stack is an attribute of the instance, perhaps transposed."""
    for instruction in reversed(before[-12:]):
        if instruction.opname in ("LOAD_FAST", "LOAD_FAST_BORROW"):
            return bool(instruction.argval == own)
        if not instruction.opname.startswith(
            ("LOAD_ATTR", "LOAD_METHOD", "LOAD_CONST", "CALL", "PRECALL", "UNARY", "CACHE")
        ):
            return False
    return False


def _mixes_positions(equation: str) -> bool:
    """Return whether an einsum of two activations sums over what they share, and keeps an index of either.

    >>> _mixes_positions("bhid,bhjd->bhij"), _mixes_positions("bld,dn->bln"), _mixes_positions("bld,bld->bl")
    (True, False, False)
    """
    inputs, arrow, output = equation.replace(" ", "").replace("...", ".").partition("->")
    factors = [set(factor) for factor in inputs.split(",")]
    if not arrow or len(factors) < 2 or not equation.isascii():
        return False
    left, right, kept = factors[0], set().union(*factors[1:]), set(output)
    shared = left & right
    return bool(shared & kept and shared - kept and (left - right) & kept and (right - left) & kept)


def _loops_over_tokens(code: CodeType) -> bool:
    """Return whether a loop over a length, or over the parts of a tensor, carries a variable from turn to turn."""
    return any(_has_token_loop(part) for part in _codes(code))


def _has_token_loop(code: CodeType) -> bool:
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "RESUME", "NOP")]
    at = {i.offset: k for k, i in enumerate(instructions)}
    lengths, own = _lengths(instructions), _own_name(code)
    for k, instruction in enumerate(instructions):
        if instruction.opname == "FOR_ITER":
            end = at.get(instruction.argval, len(instructions))
            if _is_over_tokens(instructions[:k], lengths, own) and _carried(instructions[k + 1 : end]):
                return True
        elif "JUMP" in instruction.opname and at.get(instruction.argval, k) < k:
            body = instructions[at[instruction.argval] : k]
            if not any(i.opname == "FOR_ITER" for i in body) and _is_while_over_tokens(body, lengths):
                return True
    return False


def _is_while_over_tokens(body: list[dis.Instruction], lengths: set[str]) -> bool:
    """Return whether a `while` counts up to a length, takes parts of a tensor, and carries more than the count."""
    takes_part = any(i.opname in ("BINARY_SUBSCR", "BINARY_SLICE") or i.argrepr == "[]" for i in body)
    loaded = {i.argval for i in body if i.opname.startswith("LOAD") and isinstance(i.argval, str)}
    return takes_part and bool(loaded & (_SIZES | lengths)) and len(_carried(body)) > 1


def _own_name(code: CodeType) -> str:
    """Return what a method calls its instance."""
    return code.co_varnames[0] if code.co_argcount else ""


def _locals(instruction: dis.Instruction, kind: str) -> tuple[str, ...]:
    """Return the local names that an instruction loads or stores."""
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    kinds = re.findall(r"(LOAD|STORE)_(?:FAST|DEREF)", instruction.opname)
    if len(kinds) == 1:
        kinds *= len(names)
    return tuple(name for name, k in zip(names, kinds, strict=False) if k == kind and isinstance(name, str))


def _lengths(instructions: list[dis.Instruction]) -> set[str]:
    """Return the local variables that hold a size of a tensor."""
    found: set[str] = set()
    is_size = was_stored = False
    for instruction in instructions:
        stored = _locals(instruction, "STORE")
        if was_stored and not stored:  # the next statement
            is_size = False
        is_size |= instruction.argval in _SIZES and instruction.opname.startswith("LOAD")
        found.update(stored if is_size else ())
        was_stored = bool(stored)
    return found


def _is_over_tokens(before: list[dis.Instruction], lengths: set[str], own: str) -> bool:
    """Return whether what is iterated is a range of a length, or a tensor cut along an axis."""
    expression: list[dis.Instruction] = []
    for instruction in reversed(before):
        if instruction.opname.startswith(("STORE", "POP_TOP", "RETURN", "FOR_ITER", "JUMP", "POP_JUMP")):
            break
        expression.append(instruction)
    loaded = {i.argval for i in expression if i.opname.startswith("LOAD") and isinstance(i.argval, str)}
    local = {name for i in expression for name in _locals(i, "LOAD")}
    if "range" in loaded:
        return bool(loaded & _SIZES) or ("len" in loaded and own not in local) or bool(local & lengths)
    along_features = any(i.opname.startswith("LOAD_CONST") and i.argval == -1 for i in expression)
    return bool(loaded & _CUTS) and not along_features and ("zip" not in loaded or own not in local)


def _carried(body: list[dis.Instruction]) -> set[str]:
    """Return the variables and attributes that are read in a loop before they are set there."""
    stored: set[str] = set()
    carried: set[str] = set()
    first_read: set[str] = set()
    for instruction in body:
        loads, stores = _locals(instruction, "LOAD"), _locals(instruction, "STORE")
        if instruction.opname in ("LOAD_ATTR", "STORE_ATTR"):
            name = f".{instruction.argval}"
            loads, stores = ((name,), ()) if instruction.opname == "LOAD_ATTR" else ((), (name,))
        first_read.update(name for name in loads if name not in stored)
        stored.update(stores)
        carried.update(name for name in stores if name in first_read)
    return carried
