"""Laws of `alr.factor`: the core is the full SVD, growing keeps W, gradients follow their maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alr.factor import break_even, change_of_basis, grow, relative_change, singular_values, svd_core, svd_full
from alr.history.resize import SvdFull
from alr.resize import SvdCore

close = torch.testing.assert_close


def product(U, V):
    return U @ V                                                    # (m, n)


def factors(m=40, n=30, r=12, dtype=torch.double, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=g, dtype=dtype), torch.randn(r, n, generator=g, dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 12), seed=st.integers(0, 99), data=st.data())
def test_core_is_the_full_svd_and_meets_eckart_young(m, n, r, seed, data):
    r = min(r, m, n)
    k = data.draw(st.integers(1, r))
    U, V = factors(m, n, r, seed=seed)
    slow, fast = product(*svd_full(U, V, k)), product(*svd_core(U, V, k))
    close(fast, slow, atol=1e-9, rtol=1e-9)
    tail = torch.linalg.svdvals(U @ V)[k:].norm()                       # no rank-k matrix is closer
    close((U @ V - fast).norm(), tail, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_core_in_float32_is_as_good_as_the_full_svd(k):
    U, V = factors(200, 90, 12, dtype=torch.float32)
    exact = product(*svd_full(U.double(), V.double(), k))
    fast = (product(*svd_core(U, V, k)).double() - exact).norm()
    slow = (product(*svd_full(U, V, k)).double() - exact).norm()
    assert fast <= 2 * slow + 1e-7 * exact.norm()


@pytest.mark.parametrize("resize", [SvdCore(), SvdFull(eps=0.0)])
def test_the_same_rank_is_the_same_product(resize):
    U, V = factors()
    close(product(*resize(U, V, 12)[:2]), U @ V)


def test_factors_are_balanced_after_a_resize():
    U, V = factors()
    U2, V2 = svd_core(1000 * U, V / 1000, 7)
    close(U2.mT @ U2, V2 @ V2.mT, atol=1e-8, rtol=1e-6)                 # both Gram matrices are S


@pytest.mark.parametrize("scale_u, scale_v", [(1e25, 1e-20), (1e-25, 1e20), (1e18, 1e18), (1e-18, 1e-18)])
def test_hugely_scaled_factors(scale_u, scale_v):
    U, V = factors(dtype=torch.float32)
    U2, V2 = svd_core(scale_u * U, scale_v * V, 5)
    assert U2.isfinite().all() and V2.isfinite().all()
    expected = product(*svd_full(U.double(), V.double(), 5))
    close((U2.double() @ V2.double()) / (scale_u * scale_v), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
def test_rank_deficient_factors_get_live_directions(dtype):
    U, V = factors(dtype=dtype)
    U[:, 8:] = U[:, :4]                                                 # W has rank 8 in factors of rank 12
    U2, V2 = svd_core(U, V, 10)
    close(U2 @ V2, U @ V, atol=1e-4 if dtype == torch.float32 else 1e-9, rtol=1e-4)
    assert U2.shape == (40, 10) and (U2[:, 8:] == 0).all()
    assert (V2[8:].norm(dim=1) > 0.1).all()                             # zero columns of U face rows that let gradients in


@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
def test_all_zero_and_rank_one(dtype):
    U2, V2 = svd_core(torch.zeros(9, 4, dtype=dtype), torch.zeros(4, 7, dtype=dtype), 3)
    assert (U2 == 0).all() and (V2.norm(dim=1) > 0).all()
    u, v = factors(9, 7, 1, dtype=dtype)
    close(product(*svd_core(u, v, 1)), u @ v)
    close(singular_values(u, v)[0].to(dtype), u.norm() * v.norm())


def test_growing_keeps_w_to_the_bit_and_the_new_directions_are_alive():
    U, V = factors(dtype=torch.float32)
    U2, V2 = grow(U, V, 17)
    assert torch.equal(U2[:, :12], U) and torch.equal(V2[:12], V) and (U2[:, 12:] == 0).all()
    close(V2[12:] @ V.mT, torch.zeros(5, 12), atol=1e-4, rtol=0)        # orthogonal to the old rows
    close(V2[12:] @ V2[12:].mT, V.norm(dim=1).mean() ** 2 * torch.eye(5), atol=1e-3, rtol=1e-4)
    U2.requires_grad_(), V2.requires_grad_()
    ((U2 @ V2 - 1) ** 2).sum().backward()
    assert (U2.grad[:, 12:].norm(dim=0) > 0).all()


def test_growing_by_svd_is_nearly_dead():
    """History (script v10): directions above r start at sqrt(1e-8) = 1e-4 in both factors."""
    U, V = factors(dtype=torch.float32)
    U2, V2 = SvdFull(eps=1e-8)(U, V, 17)
    assert U2[:, 12:].norm(dim=0).max() < 5e-3 and V2[12:].norm(dim=1).max() < 5e-3
    assert U2[:, :12].norm(dim=0).min() > 1


@pytest.mark.parametrize("k", [3, 12, 17])
@pytest.mark.parametrize("split", ["core", "sqrt", "left"])
def test_gradients_follow_the_change_of_basis(k, split):
    """g_U' = g_U T_U and g_V' = T_V g_V wherever the old factors span the new ones."""
    U, V = factors()
    G = torch.randn(40, 30, dtype=torch.double)
    U2, V2 = SvdCore()(U, V, k)[:2] if split == "core" else svd_full(U, V, k, split=split)
    T_U, T_V = change_of_basis(U, V, U2, V2)
    kept = min(k, 12)
    close((G @ V.mT @ T_U)[:, :kept], (G @ V2.mT)[:, :kept], atol=1e-8, rtol=1e-8)
    close((T_V @ (U.mT @ G))[:kept], (U2.mT @ G)[:kept], atol=1e-8, rtol=1e-8)


def test_relative_change_is_the_slow_one():
    U, V = factors()
    U2, V2 = svd_core(U, V, 6)
    assert relative_change(U, V, U2, V2) == pytest.approx(((U @ V - U2 @ V2).norm() / (U @ V).norm()).item(), rel=1e-6)
    assert relative_change(U, V, U, V) < 1e-7
    assert relative_change(0 * U, V, 0 * U, V) == 0.0


def test_bfloat16_factors_stay_bfloat16():
    U, V = (x.bfloat16() for x in factors())
    U2, V2 = svd_core(U, V, 6)
    assert U2.dtype == V2.dtype == torch.bfloat16
    best = product(*svd_full(U.float(), V.float(), 6))
    assert ((U2.float() @ V2.float()) - best).norm() < 0.02 * best.norm()


def test_break_even_is_where_the_counts_cross():
    assert break_even(512, 512) == 256 and break_even(512, 2048) == 409
    for m, n in [(3, 5), (64, 64), (128, 512), (1, 9)]:
        r = break_even(m, n)
        assert (r + 1) * (m + n) > m * n and (r * (m + n) <= m * n or r == 1)


@pytest.mark.parametrize("call, words", [
    (lambda U, V: svd_core(U, V, -1), "rank -1"), (lambda U, V: svd_core(U, V, 13), "grow"),
    (lambda U, V: svd_full(U, V, -3), "rank -3"), (lambda U, V: svd_full(U, V, 31), "1 to 30"),
    (lambda U, V: grow(U, V, 31), "0 to 30"), (lambda U, V: grow(U, V, 5), "never shrinks"),
    (lambda U, V: svd_full(U, V, 5, split="right"), "'sqrt' or 'left'")])
def test_impossible_ranks_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(*factors())
