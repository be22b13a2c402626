"""The Triton kernels against float64 with the mask written out, and the switch that asks for them.

The mask is computed here again from the paper's definition of Philox. Without a GPU the kernels run in Triton's
interpreter, which must be turned on before Triton is imported: `test_through_the_interpreter` starts a process that
does this. `TestKernels` is collected in that process, and on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measure import kept_bytes
from torch import Tensor

from lorakit.core import kernels
from lorakit.core.dropout import QuickDropout, Seeded, draw_mask
from lorakit.core.linear import lora_linear

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# T, I, O, r: no tile divides them, except in the last case, which has several tiles in each dimension.
SHAPES = [(1, 1, 1, 1), (37, 70, 50, 3), (65, 131, 67, 16), (260, 70, 90, 64), (64, 128, 256, 16)]
SEED = 2**62 + 12345  # both halves of the key count

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="TestKernels runs in this process")
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestKernels"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def philox(seed: int, counter: np.ndarray, rounds: int = 7) -> np.ndarray:
    """Philox-4x32 (Salmon et al. 2011, section 3.3): counters (…) of 64 bits → words (…, 4)."""
    low = np.uint64(0xFFFFFFFF)
    words = [counter & low, counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(rounds):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (second >> np.uint64(32)) ^ words[1] ^ np.uint64(key[0]),
            second & low,
            (first >> np.uint64(32)) ^ words[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return np.stack(words, -1)


def exact_mask(seed: int, p: float, rows: int, columns: int) -> Tensor:
    groups = -(-columns // 4)
    counter = np.arange(rows, dtype=np.uint64)[:, None] * np.uint64(groups) + np.arange(groups, dtype=np.uint64)
    words = philox(seed, counter).reshape(rows, groups * 4)[:, :columns]
    return torch.from_numpy(words >= p * 2**32).to(DEVICE)


def test_philox_written_out_is_philox() -> None:
    """The known answers that its authors publish for ten rounds (Random123, kat_vectors)."""
    assert philox(0, np.zeros((), np.uint64), 10).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def framed(tensor: Tensor) -> Tensor:
    """The same numbers with NaN before and after them, to catch a load beyond an edge."""
    frame = torch.full((tensor.numel() + 2 * 4096,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    inner = frame[4096 : 4096 + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return framed(torch.randn(shape).to(DEVICE, dtype))


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the rounding of `dtype`. The interpreter cuts float32 down to bfloat16 where hardware rounds."""
    tolerance = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


class TestKernels:
    __test__ = INTERPRETED or DEVICE.type == "cuda"

    @pytest.mark.parametrize("p", [0.0, 0.3])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("T", "I", "O", "r"), SHAPES)
    def test_dropout(self, T: int, I: int, O: int, r: int, dtype: torch.dtype, p: float) -> None:  # noqa: E741
        """shrink, grad_A and add_expand_, and their plain versions; the factor is float32 beside any x."""
        x, A, dS, dx = (
            drawn(T, I, dtype=dtype),
            drawn(r, I, dtype=torch.float32),
            drawn(T, r, dtype=dtype),
            drawn(T, I, dtype=dtype),
        )
        M = exact_mask(SEED, p, T, I)
        seed = SEED if p else None
        A_ = A.to(dtype).double()
        expected = {
            "shrink": 0.7 / (1 - p) * (M * x.double()) @ A_.T,
            "grad_A": dS.double().T @ (M * x.double()),
            "add_expand_": dx.double() + M * (dS.double() @ A_),
        }
        for prefix in ("", "plain_"):
            close(getattr(kernels, prefix + "shrink")(x, A, 0.7, p, seed), expected["shrink"], dtype)
            dA = getattr(kernels, prefix + "grad_A")(dS, x, p, seed)
            assert dA.dtype == torch.float32 and dA.shape == (r, I)
            close(dA, expected["grad_A"], dtype if prefix else torch.float32)
            own = framed(dx)
            assert getattr(kernels, prefix + "add_expand_")(own, dS, A, p, seed) is own
            close(own, expected["add_expand_"], dtype)
            assert own._base is not None and own._base.isnan().sum() == 2 * 4096  # nothing written beyond the edges

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("T", "I", "O", "r"), SHAPES)
    def test_grad_S_B(self, T: int, I: int, O: int, r: int, dtype: torch.dtype) -> None:  # noqa: E741
        from lorakit.core import triton_code

        dY, B, S = drawn(T, O, dtype=dtype), drawn(O, r, dtype=torch.float32), drawn(T, r, dtype=dtype)
        for version in (triton_code.grad_S_B, kernels.plain_grad_S_B):
            dS, dB = version(dY, B, S, 0.7)
            assert dS.dtype == dtype
            close(dS, 0.7 * dY.double() @ B.to(dtype).double(), dtype)
            close(dB, dY.double().T @ S.double(), dB.dtype)
        assert triton_code.grad_S_B(dY, B, S, 0.7)[1].dtype == torch.float32

    @pytest.mark.parametrize("columns", [1, 6, 131])
    def test_mask_is_philox_whatever_the_tile(self, columns: int) -> None:
        from lorakit.core import triton_code

        for seed in (0, 7, SEED):
            expected = exact_mask(seed, 0.4, 45, columns)
            for tile in (16, 64, 128):
                assert torch.equal(triton_code.mask(seed, 0.4, 45, columns, DEVICE, tile), expected)
            assert torch.equal(kernels.mask(torch.tensor(seed, device=DEVICE), 0.4, 45, columns, DEVICE), expected)

    @pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
    def test_mask_is_even_and_its_neighbours_do_not_know_each_other(self, p: float) -> None:
        T, I = 301, 403  # noqa: E741
        M, other = (kernels.mask(seed, p, T, I, DEVICE).double() for seed in (3, 4))
        spread = (p * (1 - p)) ** 0.5
        assert abs(M.mean() - (1 - p)) < 5 * spread / (T * I) ** 0.5
        assert ((M.mean(0) - (1 - p)).abs() < 5 * spread / T**0.5).all()
        assert ((M.mean(1) - (1 - p)).abs() < 5 * spread / I**0.5).all()
        centred = (M - (1 - p)) / spread
        pairs = [centred * (other - (1 - p)) / spread]
        pairs += [centred[:, lag:] * centred[:, :-lag] for lag in (1, 2, 3, 4)]
        pairs += [centred[lag:] * centred[:-lag] for lag in (1, 2)]
        for pair in pairs:
            assert abs(pair.mean()) < 5 / pair.numel() ** 0.5

    def test_every_p_has_a_threshold(self) -> None:
        assert kernels.mask(1, 1e-12, 40, 64, DEVICE).all()
        assert kernels.mask(1, 1 - 1e-12, 40, 64, DEVICE).sum() == 0

    def test_seed_is_drawn_from_torchs_generator(self) -> None:
        torch.manual_seed(5)
        first, second = kernels.draw_seed(DEVICE), kernels.draw_seed(DEVICE)
        torch.manual_seed(5)
        assert torch.equal(first, kernels.draw_seed(DEVICE)) and not torch.equal(first, second)
        assert first.dtype == torch.int64 and first.shape == () and first.device.type == DEVICE.type

    def test_tall_tiles(self) -> None:
        from lorakit.core import triton_code

        x, A = drawn(64 * 256 + 3, 5, dtype=torch.float32), drawn(2, 5, dtype=torch.float32)
        close(triton_code.shrink(x, A, 0.7), 0.7 * x.double() @ A.double().T, torch.float32)

    def test_rows_that_do_not_lie_side_by_side(self) -> None:
        from lorakit.core import triton_code

        x, dx = drawn(20, 33, dtype=torch.float32).T, drawn(20, 33, dtype=torch.float32).T
        A, B, S = (drawn(*shape, dtype=torch.float32).T for shape in [(20, 3), (3, 33), (3, 33)])
        wide = drawn(33, 1, dtype=torch.float32).expand(33, 33)
        M = exact_mask(SEED, 0.3, 33, 20)
        before = dx.double()
        close(triton_code.shrink(x, A, 0.7, 0.3, SEED), M * x.double() @ A.double().T, torch.float32)
        close(triton_code.grad_A(S, x, 0.3, SEED), S.double().T @ (M * x.double()), torch.float32)
        assert triton_code.add_expand_(dx, S, A, 0.3, SEED) is dx
        close(dx, before + M * (S.double() @ A.double()), torch.float32)
        dS, dB = triton_code.grad_S_B(wide, B, S, 0.7)
        close(dS, 0.7 * wide.double() @ B.double(), torch.float32)
        close(dB, wide.double().T @ S.double(), torch.float32)

    def test_no_rows(self) -> None:
        from lorakit.core import triton_code

        x, A, B, S = torch.empty(0, 5), torch.randn(2, 5), torch.randn(4, 2), torch.empty(0, 2)
        x, A, B, S = (tensor.to(DEVICE) for tensor in (x, A, B, S))
        assert triton_code.shrink(x, A, 1.0, 0.3, 1).shape == (0, 2)
        assert torch.equal(triton_code.grad_A(S, x, 0.3, 1), torch.zeros(2, 5, device=DEVICE))
        assert triton_code.add_expand_(x, S, A, 0.3, 1).shape == (0, 5)
        dS, dB = triton_code.grad_S_B(x @ A.T @ B.T, B, S, 1.0)
        assert dS.shape == (0, 2) and torch.equal(dB, torch.zeros(4, 2, device=DEVICE))

    def test_equal_arguments_give_equal_bits(self) -> None:
        from lorakit.core import triton_code

        dY, B, S = (drawn(*shape, dtype=torch.bfloat16) for shape in [(300, 160), (160, 4), (300, 4)])
        twice = [(*triton_code.grad_S_B(dY, B, S, 0.7), triton_code.grad_A(S, dY, 0.3, SEED)) for _ in range(2)]
        assert all(torch.equal(first, second) for first, second in zip(*twice, strict=True))

    @pytest.mark.parametrize("with_gain", [False, True])
    def test_an_attached_layer_in_kernels(self, with_gain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """All of them together in `lora_linear`: values, both derivatives, and eight bytes kept of the mask."""
        T, I, O, r, p = 40, 70, 50, 3, 0.3  # noqa: E741
        x, weight, bias, A, B, gain = (
            drawn(*shape, dtype=torch.float32).requires_grad_()
            for shape in [(T, I), (O, I), (O,), (r, I), (O, r), (O,)]
        )
        wanted = [x, A, B, *([gain] if with_gain else [])]

        def layer() -> Tensor:
            torch.manual_seed(5)
            return lora_linear(x, weight, bias, A, B, 0.7, QuickDropout(p), gain if with_gain else None)

        torch.manual_seed(5)
        M = exact_mask(int(kernels.draw_seed(DEVICE)), p, T, I) / (1 - p)
        exact = x.double() @ weight.double().T + 0.7 * (M * x.double()) @ A.double().T @ B.double().T
        exact = (exact * gain.double() if with_gain else exact) + bias.double()
        monkeypatch.setenv("LORAKIT_KERNELS", "1")
        kept = kept_bytes(layer, (weight, A, B, bias, gain))
        y = layer()
        close(y, exact, torch.float32)
        once = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        twice = torch.autograd.grad(sum((gradient.square().sum() for gradient in once), torch.zeros(())), wanted)
        plain = torch.autograd.grad(layer().sin().sum(), wanted)
        frame = 2 * 4096  # of `drawn`, around x
        assert kept == 4 * (T * I + frame + T * r + (T * O if with_gain else 0)) + 8
        expected = torch.autograd.grad(exact.sin().sum(), wanted, create_graph=True)
        expected_twice = torch.autograd.grad(
            sum((gradient.square().sum() for gradient in expected), torch.zeros(())), wanted
        )
        for got, right in zip((*once, *plain, *twice), (*expected, *expected, *expected_twice), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())

    def test_available(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.randn(3, 8, device=DEVICE)
        monkeypatch.setenv("LORAKIT_KERNELS", "1")
        assert kernels.available(x, 5)
        assert kernels.available(x.bfloat16(), 64)
        assert not kernels.available(x.double(), 5)
        assert not kernels.available(x, kernels.RANKS + 1)
        monkeypatch.setenv("LORAKIT_KERNELS", "0")
        assert not kernels.available(x)

    def test_nothing_runs_in_a_kernel_that_is_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The mask is kept in bits, not as a seed, and dB is made in dY's dtype, where the kernel makes float32."""
        monkeypatch.setenv("LORAKIT_KERNELS", "0")
        dY, B, S = (drawn(*shape, dtype=torch.bfloat16) for shape in [(40, 50), (50, 4), (40, 4)])
        assert not kernels.available(dY, 4)
        assert kernels.grad_S_B(dY, B, S, 0.7)[1].dtype == torch.bfloat16
        assert not isinstance(draw_mask(dY, QuickDropout(0.3), 4), Seeded)
        monkeypatch.delenv("LORAKIT_KERNELS")
        assert kernels.grad_S_B(dY, B, S, 0.7)[1].dtype == torch.float32
        assert isinstance(draw_mask(dY, QuickDropout(0.3), 4), Seeded)

    def test_grad_S_B_is_plain_where_one_pass_moves_more_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORAKIT_KERNELS", "1")
        for rank, dtype in ((16, torch.float32), (17, torch.bfloat16)):
            dY, B, S = (drawn(*shape, dtype=torch.bfloat16) for shape in [(40, 50), (50, rank), (40, rank)])
            dS, dB = kernels.grad_S_B(dY, B, S, 0.7)
            assert dB.dtype == dtype
            close(dB, dY.double().T @ S.double(), dtype)
            close(dS, 0.7 * dY.double() @ B.double(), torch.bfloat16)

    @pytest.mark.parametrize("fault", ["wrong", "raising"])
    @pytest.mark.parametrize("function", ["shrink", "grad_A", "add_expand_", "grad_S_B"])
    def test_a_kernel_that_fails_its_check_is_left_out(
        self, function: str, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from lorakit.core import triton_code

        right = getattr(triton_code, function)

        def wrong(*arguments: Any) -> Any:
            if fault == "raising":
                raise RuntimeError("no such instruction")
            result = right(*arguments)
            (result if isinstance(result, Tensor) else result[1])[-1, -1] += 100
            return result

        monkeypatch.setattr(triton_code, function, wrong)
        monkeypatch.setattr(kernels, "_sound", {})
        x = torch.randn(3, 8, device=DEVICE)
        monkeypatch.setenv("LORAKIT_KERNELS", "1")
        message = f"{function} raised RuntimeError: no such instruction"
        message = message if fault == "raising" else f"the result of {function} differs from plain torch's"
        with pytest.warns(UserWarning, match=f"kernels are not used for torch.float32: {message}"):
            assert not kernels.available(x, 5)
        assert not kernels.available(x, 5)

    def test_nothing_is_checked_while_a_graph_is_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORAKIT_KERNELS", "1")
        monkeypatch.setattr(kernels, "_sound", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not kernels.available(torch.randn(3, 8, device=DEVICE), 5)
        assert kernels._sound == {}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has taken the compiler's place")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_into_96_KiB_of_shared_memory(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for Ampere and Hopper, compiled without either GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    from lorakit.core import triton_code

    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.bool: "*i1"}
    compiled = []

    def launch(kernel: Any, grid: Any, *arguments: Any, **given: Any) -> None:
        signature: dict[str, str] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        options: dict[str, Any] = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
        constants = given
        for index, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if argument is None:
                constants[name] = None
            elif isinstance(argument, Tensor):
                signature[name] = pointers[argument.dtype]
            else:
                signature[name] = "fp32" if isinstance(argument, float) else "i32"
            if not isinstance(argument, float | None) and name not in ("threshold", "rows"):
                attributes[(index,)] = [["tt.divisibility", 16]]  # as the launcher finds, for large matrices
        signature.update(dict.fromkeys(constants, "constexpr"))
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", capability, 32)
        binary = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
        compiled.append((kernel.__name__, binary.metadata.shared))

    monkeypatch.setattr(triton_code, "_launch", launch)
    with torch.device("meta"):
        x, A, S = torch.empty(16384, 4096).bfloat16(), torch.empty(64, 4096), torch.empty(16384, 64).bfloat16()
        dY, B = torch.empty(16384, 14336).bfloat16(), torch.empty(14336, 64)
        seed = torch.empty((), dtype=torch.int64)
        triton_code.mask(seed, 0.05, 16384, 4096, x.device)
        triton_code.shrink(x, A, 2.0, 0.05, seed)
        triton_code.grad_A(S, x, 0.05, seed)
        triton_code.add_expand_(x, S, A, 0.05, seed)
        triton_code.grad_S_B(dY, B, S, 2.0)
    names = ["_mask", "_shrink", "_grad_A", "_add_expand", "_grad_S_B"]
    assert [name for name, _ in compiled] == names
    assert all(shared <= triton_code.SHARED for _, shared in compiled), compiled


def test_agreement_is_up_to_rounding_and_never_with_what_is_not_a_number() -> None:
    right = (torch.tensor([1.0, 2.0]),)
    assert kernels.agree((torch.tensor([1.001, 2.001]),), right, torch.float32)
    assert not kernels.agree((torch.tensor([1.0, 2.1]),), right, torch.float32)
    assert not kernels.agree((torch.tensor([1.0, torch.nan]),), right, torch.float32)
    assert kernels.agree((torch.tensor([1.0, 2.05]),), right, torch.bfloat16)


def test_kernels_are_on_unless_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAKIT_KERNELS", raising=False)
    assert kernels.switched_on()
    for value, on in [("1", True), (" 0 ", False), ("0", False), ("", True)]:
        monkeypatch.setenv("LORAKIT_KERNELS", value)
        assert kernels.switched_on() is on
    monkeypatch.setenv("LORAKIT_KERNELS", "yes")
    with pytest.raises(ValueError, match="LORAKIT_KERNELS='yes': expected 1 .* or 0"):
        kernels.switched_on()


def test_a_broken_triton_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "lorakit.core.triton_code", None)
    monkeypatch.delattr("lorakit.core.triton_code", raising=False)
    kernels._imported.cache_clear()
    with pytest.warns(UserWarning, match="does without its kernels: importing Triton raised"):
        assert not kernels._imported()
    assert not kernels._imported()
    kernels._imported.cache_clear()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on any device")
def test_on_a_cpu_everything_is_plain_and_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float64, torch.bfloat16):
            dY, B, S = torch.randn(6, 5).to(dtype), torch.randn(5, 2), torch.randn(6, 2).to(dtype)
            assert not kernels.available(dY)
            assert kernels.grad_S_B(dY, B, S, 0.7)[1].dtype == dtype
            assert torch.equal(kernels.grad_S_B(dY, B, S, 0.7)[0], (dY @ B.to(dtype)) * 0.7)


def test_importing_the_kernels_imports_no_triton() -> None:
    script = (
        "import sys, torch; loaded = set(sys.modules); import lorakit.core.kernels; print(set(sys.modules) - loaded)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "lorakit.core.kernels" in done.stdout and "'triton" not in done.stdout
