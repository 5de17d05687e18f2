"""Which operations of torch have right second derivatives: some 750 of them, against differences of gradients.

    python benchmarks/second_derivatives.py            # what is not right; half a minute
    python benchmarks/second_derivatives.py conv grid  # cases whose names contain one of these words

Each case is a function of tensors in float64. Its loss <w, out> + |out|^2 / 2 is differentiated twice along a direction,
and is compared with central differences of the gradients, and these with differences of the values. Then the library
is asked: what is wrong without a word must be refused (`bilevel/_numerics/second_derivatives.py`), what is right must
pass. `tests/test_second_derivatives.py` demands both (`pytest -m slow`).

Verdicts: right; raises (torch has none, and says so); nan; wrong; no gradient (not differentiable at all, or it says
why not); gradient wrong (the first one too, by design or by a jump).
"""

from __future__ import annotations

import math
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel._calculus import grad

torch.set_default_dtype(torch.float64)

# fmt: off
CASES = {}
def case(name, fn, *shapes, at=None):
    CASES[name] = (fn, shapes or ((12,),), at)

def build(m):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return m()

def module(name, make, *shapes, train=True, out=None, extra=()):
    net = build(make).train(train)
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    pshapes = [tuple(dict(net.named_parameters())[n].shape) for n in names]
    base = [dict(net.named_parameters())[n].detach() for n in names]
    def fn(*ts):
        ps = dict(zip(names, ts[:len(names)], strict=True))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            bufs = {n: b.clone() for n, b in net.named_buffers()}
            o = torch.func.functional_call(net, {**ps, **bufs}, (*ts[len(names):], *extra))
        return o if out is None else out(o)
    CASES[name] = (fn, tuple(pshapes) + shapes, ("params", base))

g = torch.Generator().manual_seed(0)
R = lambda *s: torch.randn(*s, generator=g)
pos = lambda t: t.abs() + 0.5
idx = torch.tensor([0, 2, 1, 2])

# unary
UN = """abs acos_ acosh asin_ asinh atan_ atanh_ ceil cos cosh digamma_p lgamma_p erf erfc erfinv_ exp exp2 expm1 floor frac log_p log10_p log1p_p log2_p logit_u
neg reciprocal_p relu round rsqrt_p sigmoid sign sin sinc sinh sqrt_p square tan tanh trunc i0 positive deg2rad angle nan_to_num""".split()
def wrap(n):
    if n.endswith("_p"): return n[:-2], pos
    if n.endswith("_u"): return n[:-2], lambda t: t.sigmoid()*0.8+0.1
    if n.endswith("_"): return n[:-1], lambda t: t.tanh()*0.9
    return n, lambda t: t
for u in UN:
    n, d = wrap(u)
    f = getattr(torch, n)
    case(n, lambda t, f=f, d=d: f(d(t)))
case("acosh", lambda t: torch.acosh(pos(t)+1))
case("softplus threshold", lambda t: F.softplus(t*30, beta=1, threshold=20))
for s in "bessel_j0 bessel_j1 bessel_y0 bessel_y1 modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 scaled_modified_bessel_k0 airy_ai entr_p erfcx i0e i1 i1e log_ndtr ndtr ndtri_u spherical_bessel_j0 psi_p gammaln_p expit log_softmax".split():
    n, d = wrap(s)
    f = getattr(torch.special, n)
    if n == "log_softmax": f = lambda t: torch.special.log_softmax(t, 0)
    case("special."+n, lambda t, f=f, d=d: f(d(t)))
case("special.zeta", lambda t: torch.special.zeta(torch.tensor(2.5), pos(t)))
case("special.xlog1py", lambda a, b: torch.special.xlog1py(a, pos(b)), (5,), (5,))
case("xlogy", lambda a, b: torch.xlogy(a, pos(b)), (5,), (5,))
case("polygamma", lambda t: torch.polygamma(1, pos(t)))
case("polygamma2", lambda t: torch.polygamma(2, pos(t)))
case("mvlgamma", lambda t: torch.mvlgamma(pos(t)+2, 2))
case("gammainc", lambda t: torch.special.gammainc(torch.tensor(1.5), pos(t)))
case("gammaincc", lambda t: torch.special.gammaincc(torch.tensor(1.5), pos(t)))
case("chebyshev", lambda t: torch.special.chebyshev_polynomial_t(t, 3))
# binary
for b in "add sub mul div atan2 hypot maximum minimum fmax fmin logaddexp logaddexp2 copysign ldexp fmod remainder true_divide rsub".split():
    f = getattr(torch, b)
    case(b, lambda a, c, f=f: f(a, c + 3), (5,), (5,))
case("pow tensor", lambda a, b: pos(a) ** b, (5,), (5,))
case("float_power", lambda a: torch.float_power(pos(a), 2.5))
case("pow scalar base", lambda b: 2.0 ** b)
for e in (0, 1, 2, 3, 0.5, 1.5, -1):
    case(f"pow {e}", lambda a, e=e: pos(a) ** e)
for e in (1, 2, 3):
    case(f"pow {e} at 0", lambda a, e=e: a ** e, (4,), at=torch.tensor([0., 1., 0., -2.]))
case("pow tensor exponent 2 at 0", lambda a: a ** torch.full((4,), 2.0), (4,), at=torch.tensor([0., 1., 0., -2.]))
case("pow tensor exponent 3 at 0", lambda a: a ** torch.full((4,), 3.0), (4,), at=torch.tensor([0., 1., 0., -2.]))
case("pow tensor exponents both, base 0..", lambda a, b: a ** (b + 3), (2,), (2,), at=torch.tensor([1., 2., 0., 0.]))
case("square of abs at 0", lambda a: a.abs() ** 2, (4,), at=torch.tensor([0., 1., 0., -2.]))
case("sinc at 0", lambda a: torch.sinc(a), (4,), at=torch.tensor([0., 1., 0., -2.]))
case("xlogy x=0", lambda a: torch.xlogy(a, a + 2), (4,), at=torch.tensor([0., 1., 0., -1.]))
case("i1 at 0", lambda a: torch.special.i1(a), (4,), at=torch.tensor([0., 1., 0., -2.]))
case("i1e at 0", lambda a: torch.special.i1e(a), (4,), at=torch.tensor([1e-9, 1., 2., -2.]))
case("j0 at 0", lambda a: torch.special.bessel_j0(a), (4,), at=torch.tensor([0., 1., 0., -2.]))
case("spherical at 0", lambda a: torch.special.spherical_bessel_j0(a), (4,), at=torch.tensor([0., 1., 0., -2.]))
case("hypot^2 at 0", lambda a, b: torch.hypot(a, b) ** 2, (2,), (2,), at=torch.tensor([0., 1., 0., -2.]))
case("complex abs^2 at 0", lambda a, b: torch.complex(a, b).abs() ** 2, (2,), (2,), at=torch.tensor([0., 1., 0., -2.]))
case("lerp", lambda a, b, c: torch.lerp(a, b, c), (4,), (4,), (4,))
case("addcmul", lambda a, b, c: torch.addcmul(a, b, c), (4,), (4,), (4,))
case("addcdiv", lambda a, b, c: torch.addcdiv(a, b, pos(c)), (4,), (4,), (4,))
case("where", lambda a, b: torch.where(a > 0, a * b, b ** 2), (4,), (4,))
case("clamp", lambda a: a.clamp(-0.5, 0.5) * a)
case("clamp tensors", lambda a, b, c: torch.clamp(a, b - 2, c + 2) * a, (4,), (4,), (4,))
case("masked_fill", lambda a: a.masked_fill(a > 0, 2.0) * a)
case("masked_select", lambda a: a[a > 0] ** 3)
case("masked_scatter", lambda a, b: torch.zeros(4).masked_scatter(torch.tensor([True, False, True, False]), a) * b, (4,), (4,))
# reductions
M = (3, 4)
for r in "sum mean amax amin logsumexp var std prod nansum nanmean median nanmedian max min argmax".split():
    f = getattr(torch, r)
    def fr(t, f=f, r=r):
        o = f(t, dim=1)
        o = o[0] if isinstance(o, tuple) else o
        return o if o.is_floating_point() else o * 1.0 + t[:, 0] ** 2
    case(r, fr, M)
case("prod all", lambda t: t.prod(), (4,))
case("prod all, one zero", lambda t: t.prod() , (4,), at=torch.tensor([0., 1., 3., -2.]))
case("prod all, two zeros", lambda t: t.prod() , (4,), at=torch.tensor([0., 1., 0., -2.]))
case("prod all, three zeros", lambda t: t.prod() , (4,), at=torch.tensor([0., 0., 0., -2.]))
case("prod dim, zeros", lambda t: t.prod(1) , (2, 3), at=torch.tensor([0., 1., 3., 0., 0., -2.]))
case("prod dim, one zero", lambda t: t.prod(1) , (2, 3), at=torch.tensor([0., 1., 3., 1.5, 2., -2.]))
case("cumprod", lambda t: t.cumprod(1), M)
case("cumprod one zero", lambda t: t.cumprod(0), (4,), at=torch.tensor([2., 0., 3., -2.]))
case("cumprod two zeros", lambda t: t.cumprod(0), (4,), at=torch.tensor([2., 0., 3., 0.]))
case("cumsum", lambda t: t.cumsum(1) ** 2, M)
case("logcumsumexp", lambda t: t.logcumsumexp(1), M)
case("cummax", lambda t: t.cummax(1)[0], M)
case("cummin", lambda t: t.cummin(1)[0], M)
case("sort", lambda t: t.sort(1)[0], M)
case("topk", lambda t: t.topk(2, 1)[0], M)
case("kthvalue", lambda t: t.kthvalue(2, 1)[0], M)
case("mode", lambda t: t.mode(1)[0], M)
case("msort", lambda t: t.msort(), M)
case("quantile", lambda t: t.quantile(0.3, dim=1), M)
case("nanquantile", lambda t: t.nanquantile(0.3, dim=1), M)
case("aminmax", lambda t: torch.stack(torch.aminmax(t, dim=1)), M)
case("var_mean", lambda t: torch.stack(torch.var_mean(t, dim=1)), M)
case("std_mean", lambda t: torch.stack(torch.std_mean(t, dim=1)), M)
case("var correction 0", lambda t: torch.var(t, dim=1, correction=0), M)
case("trapezoid", lambda t: torch.trapezoid(t, dim=1) ** 2, M)
case("diff", lambda t: t.diff(dim=1) ** 2, M)
case("gradient", lambda t: torch.gradient(t, dim=1)[0], M)
case("cov", lambda t: torch.cov(t), M)
case("corrcoef", lambda t: torch.corrcoef(t), M)
case("renorm", lambda t: torch.renorm(t, 2, 0, 1.0), M)
case("renorm p=1", lambda t: torch.renorm(t, 1, 0, 1.0), M)
for p in (0.5, 1, 1.5, 2, 3, 4, math.inf, -1, 0):
    case(f"vector_norm {p}", lambda t, p=p: torch.linalg.vector_norm(t, p, dim=1), M)
    case(f"norm {p}", lambda t, p=p: torch.norm(t, p, dim=1), M)
for p in (1, 1.5, 2, 3, 4):
    case(f"vector_norm {p} squared at 0", lambda t, p=p: torch.linalg.vector_norm(t, p) ** 2, (3,), at=torch.zeros(3))
    case(f"vector_norm {p} pow p at 0", lambda t, p=p: torch.linalg.vector_norm(t, p) ** p, (3,), at=torch.zeros(3))
    case(f"vector_norm {p} pow p one zero", lambda t, p=p: torch.linalg.vector_norm(t, p) ** p, (3,), at=torch.tensor([0., 1., -2.]))
    case(f"vector_norm {p} one zero", lambda t, p=p: torch.linalg.vector_norm(t, p), (3,), at=torch.tensor([0., 1., -2.]))
    case(f"dist {p}", lambda a, b, p=p: torch.dist(a, b, p), (3,), (3,))
case("norm squared at 0", lambda t: t.norm() ** 2, (3,), at=torch.zeros(3))
case("fro squared at 0", lambda t: torch.linalg.matrix_norm(t) ** 2, (2, 2), at=torch.zeros(4))
case("dist squared at 0", lambda a, b: torch.dist(a, b) ** 2, (2,), (2,), at=torch.tensor([1., 2, 1, 2]))
case("sqrt(sum squares)^2 at 0", lambda t: t.square().sum().sqrt() ** 2, (3,), at=torch.zeros(3))
for o in ("fro", "nuc", 1, 2, math.inf, -2, -1):
    case(f"matrix_norm {o}", lambda t, o=o: torch.linalg.matrix_norm(t, o), (3, 4))
for p in (0, 1, 1.5, 2, 3, math.inf):
    case(f"cdist p={p}", lambda a, b, p=p: torch.cdist(a, b, p=p), (3, 2), (4, 2))
    case(f"pdist p={p}", lambda a, p=p: F.pdist(a, p=p), (4, 2))
    case(f"pairwise_distance p={p}", lambda a, b, p=p: F.pairwise_distance(a, b, p=p), (3, 2), (3, 2))
case("cdist mm", lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"), (3, 2), (4, 2))
case("cosine_similarity", lambda a, b: F.cosine_similarity(a, b), (3, 2), (3, 2))
case("normalize", lambda a: F.normalize(a, dim=1), M)
case("normalize at 0", lambda a: F.normalize(a, dim=0), (3,), at=torch.zeros(3))
# linalg
S = (3, 3)
I3 = torch.eye(3)
spd = lambda a: a @ a.mT + 2 * I3
sym = lambda a: (a + a.mT) / 2 + torch.diag(torch.arange(3.0) * 3)
case("inv", lambda a: torch.linalg.inv(a + 4 * I3), S)
case("pinv", lambda a: torch.linalg.pinv(a), (3, 4))
case("pinv hermitian", lambda a: torch.linalg.pinv(sym(a), hermitian=True), S)
case("det", lambda a: torch.linalg.det(a), S)
case("det singular", lambda a: torch.linalg.det(a), S, at=torch.tensor([1., 2, 3, 2, 4, 6, 1, 0, 1]))
case("det rank 1", lambda a: torch.linalg.det(a), S, at=torch.tensor([1., 2, 3, 2, 4, 6, 3, 6, 9]))
case("slogdet", lambda a: torch.linalg.slogdet(a + 4 * I3)[1], S)
case("logdet", lambda a: torch.logdet(spd(a)), S)
case("cholesky", lambda a: torch.linalg.cholesky(spd(a)), S)
case("cholesky_ex", lambda a: torch.linalg.cholesky_ex(spd(a))[0], S)
case("cholesky_solve", lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(spd(a))), S, (3, 2))
case("cholesky_inverse", lambda a: torch.cholesky_inverse(torch.linalg.cholesky(spd(a))), S)
case("solve", lambda a, b: torch.linalg.solve(a + 4 * I3, b), S, (3, 2))
case("solve left=False", lambda a, b: torch.linalg.solve(a + 4 * I3, b, left=False), S, (2, 3))
case("solve_ex", lambda a, b: torch.linalg.solve_ex(a + 4 * I3, b)[0], S, (3, 2))
case("inv_ex", lambda a: torch.linalg.inv_ex(a + 4 * I3)[0], S)
case("solve_triangular", lambda a, b: torch.linalg.solve_triangular(a.tril() + 4 * I3, b, upper=False), S, (3, 2))
case("triangular_solve", lambda a, b: torch.triangular_solve(b, a.tril() + 4 * I3, upper=False)[0], S, (3, 2))
case("solve_triangular unitri", lambda a, b: torch.linalg.solve_triangular(a.tril() + 4 * I3, b, upper=False, unitriangular=True), S, (3, 2))
case("lstsq", lambda a, b: torch.linalg.lstsq(a, b).solution, (4, 3), (4, 2))
case("lstsq wide", lambda a, b: torch.linalg.lstsq(a, b).solution, (3, 4), (3, 2))
case("lu", lambda a: torch.cat(torch.linalg.lu(a + 4 * I3)[1:]), S)
case("lu_factor", lambda a: torch.linalg.lu_factor(a + 4 * I3)[0], S)
case("lu tall", lambda a: torch.cat([t.reshape(-1) for t in torch.linalg.lu(a)[1:]]), (4, 3))
case("lu wide", lambda a: torch.cat([t.reshape(-1) for t in torch.linalg.lu(a)[1:]]), (3, 4))
def lus(a, b):
    LU, p = torch.linalg.lu_factor(a + 4 * I3); return torch.linalg.lu_solve(LU, p, b)
case("lu_solve", lus, S, (3, 2))
def luu(a):
    LU, p = torch.linalg.lu_factor(a + 4 * I3); P, L, U = torch.lu_unpack(LU, p); return L @ U + U
case("lu_unpack", luu, S)
case("qr", lambda a: torch.cat([t.reshape(-1) for t in torch.linalg.qr(a)]), (4, 3))
case("qr square", lambda a: torch.cat([t.reshape(-1) for t in torch.linalg.qr(a)]), S)
case("qr wide", lambda a: torch.cat([t.reshape(-1) for t in torch.linalg.qr(a)]), (3, 4))
case("qr complete square", lambda a: torch.cat([t.reshape(-1) for t in torch.linalg.qr(a, "complete")]), S)
case("qr r", lambda a: torch.linalg.qr(a, "r")[1], S)
case("svdvals", lambda a: torch.linalg.svdvals(a), (3, 4))
case("svd U^2 S Vh^2", lambda a: torch.cat([t.square().reshape(-1) for t in torch.linalg.svd(a, full_matrices=False)]), (3, 4))
case("svd tall", lambda a: torch.cat([t.square().reshape(-1) for t in torch.linalg.svd(a, full_matrices=False)]), (4, 3))
def svdrec(a):
    U, s, V = torch.linalg.svd(a, full_matrices=False); return (U * s.exp()) @ V
case("svd spectral function", svdrec, (3, 4))
case("torch.svd", lambda a: torch.svd(a)[1], (3, 4))
case("svd_lowrank", lambda a: torch.svd_lowrank(a, 3)[1], (3, 4))
case("eigvalsh", lambda a: torch.linalg.eigvalsh(sym(a)), S)
case("eigh", lambda a: torch.cat([t.square().reshape(-1) for t in torch.linalg.eigh(sym(a))]), S)
def eighf(a):
    w, Q = torch.linalg.eigh(sym(a)); return (Q * w.sin()) @ Q.mT
case("eigh spectral function", eighf, S)
case("eigvals", lambda a: torch.view_as_real(torch.linalg.eigvals(a + torch.diag(torch.arange(3.0) * 5))), S)
case("eig", lambda a: (lambda w, V: torch.view_as_real((V * w.exp()) @ torch.linalg.inv(V)))(*torch.linalg.eig(a + torch.diag(torch.arange(3.0) * 5))), S)
case("matrix_exp", lambda a: torch.linalg.matrix_exp(a * 0.5), S)
case("matrix_power 3", lambda a: torch.linalg.matrix_power(a, 3), S)
case("matrix_power -2", lambda a: torch.linalg.matrix_power(a + 4 * I3, -2), S)
case("householder_product", lambda a, t: torch.linalg.householder_product(a, t), (4, 2), (2,))
case("ormqr", lambda a, t, c: torch.ormqr(a, t, c), (4, 2), (2,), (4, 2))
case("ldl_solve", lambda a, b: torch.linalg.ldl_solve(*torch.linalg.ldl_factor(spd(a)), b), S, (3, 2))
case("multi_dot", lambda a, b: torch.linalg.multi_dot([a, b, a.mT]), S, S)
case("cond", lambda a: torch.linalg.cond(a), S)
case("cross", lambda a, b: torch.linalg.cross(a, b), S, S)
case("vander", lambda a: torch.linalg.vander(a), (3,))
case("tensorsolve", lambda a, b: torch.linalg.tensorsolve(a + 4 * I3, b), S, (3,))
# products
case("mm", lambda a, b: a @ b, (3, 2), (2, 3))
case("bmm", lambda a, b: torch.bmm(a, b), (2, 3, 2), (2, 2, 3))
case("baddbmm", lambda c, a, b: torch.baddbmm(c, a, b, beta=0.3), (2, 3, 3), (2, 3, 2), (2, 2, 3))
case("addmm", lambda c, a, b: torch.addmm(c, a, b), (3, 3), (3, 2), (2, 3))
case("addmv", lambda c, a, b: torch.addmv(c, a, b), (3,), (3, 2), (2,))
case("addr", lambda c, a, b: torch.addr(c, a, b), (3, 2), (3,), (2,))
case("addbmm", lambda c, a, b: torch.addbmm(c, a, b), (3, 3), (2, 3, 2), (2, 2, 3))
case("einsum", lambda a, b: torch.einsum("ij,jk,ik->i", a, b, a @ b), (3, 2), (2, 3))
case("outer", lambda a, b: torch.outer(a, b), (3,), (2,))
case("kron", lambda a, b: torch.kron(a, b), (2, 2), (2, 2))
case("dot", lambda a, b: torch.dot(a, b), (3,), (3,))
case("vdot", lambda a, b: torch.vdot(a, b), (3,), (3,))
case("tensordot", lambda a, b: torch.tensordot(a, b, 1), (3, 2), (2, 3))
case("bilinear", lambda a, b, w: F.bilinear(a, b, w), (3, 2), (3, 2), (2, 2, 2))
case("chain_matmul", lambda a, b: torch.chain_matmul(a, b), (3, 2), (2, 3))
# fft
case("fft", lambda a: torch.view_as_real(torch.fft.fft(a)), (5,))
case("rfft", lambda a: torch.view_as_real(torch.fft.rfft(a)), (5,))
case("irfft", lambda a: torch.fft.irfft(torch.complex(a, a ** 2), n=5), (3,))
case("hfft", lambda a: torch.fft.hfft(torch.complex(a, a ** 2)), (3,))
case("fft2 abs", lambda a: torch.fft.fft2(a).abs(), (3, 4))
case("stft", lambda a: torch.view_as_real(torch.stft(a, 4, return_complex=True, window=torch.ones(4))), (12,))
case("istft", lambda a, b: torch.istft(torch.complex(a, b), 4, window=torch.ones(4)), (3, 5), (3, 5))
case("complex angle", lambda a, b: torch.complex(a, b).angle(), (3,), (3,))
case("polar", lambda a, b: torch.view_as_real(torch.polar(a, b)), (3,), (3,))
case("complex sgn", lambda a, b: torch.view_as_real(torch.complex(a, b).sgn()), (3,), (3,))
case("complex log/pow", lambda a, b: torch.view_as_real(torch.complex(a, b) ** 1.5), (3,), (3,))
# indexing
case("gather", lambda a: a.gather(1, torch.tensor([[0, 0], [1, 2], [3, 3]])) ** 2, M)
case("index_select", lambda a: a.index_select(0, idx[:3]) ** 2, M)
case("getitem", lambda a: a[idx] ** 2, M)
case("take", lambda a: a.take(torch.tensor([0, 0, 5])) ** 2, M)
case("take_along_dim", lambda a: a.take_along_dim(torch.tensor([[0, 0], [1, 2], [3, 3]]), 1), M)
case("index_add", lambda a, b: a.index_add(0, idx, b ** 2), M, (4, 4))
case("index_copy", lambda a, b: a.index_copy(0, torch.tensor([0, 2]), b ** 2), M, (2, 4))
case("index_put", lambda a, b: a.index_put((idx,), b ** 2, accumulate=True), M, (4, 4))
case("index_fill", lambda a, b: a.index_fill(0, torch.tensor([1]), b[0] ** 2), M, (1,))
case("put", lambda a, b: a.put(torch.tensor([0, 3]), b ** 2), M, (2,))
case("put accumulate", lambda a, b: a.put(torch.tensor([0, 0]), b ** 2, accumulate=True), M, (2,))
for r in ("prod", "mean", "amax", "amin"):
    case(f"index_reduce {r}", lambda a, b, r=r: a.index_reduce(0, idx, b, r), (3, 2), (4, 2))
    case(f"index_reduce {r} no self", lambda a, b, r=r: a.index_reduce(0, idx, b, r, include_self=False), (3, 2), (4, 2))
for r in ("sum", "prod", "mean", "amax", "amin"):
    case(f"scatter_reduce {r}", lambda a, b, r=r: a.scatter_reduce(0, idx, b, r), (3,), (4,))
    case(f"scatter_reduce {r} no self", lambda a, b, r=r: a.scatter_reduce(0, idx, b, r, include_self=False), (3,), (4,))
case("scatter_reduce prod zeros", lambda a, b: a.scatter_reduce(0, idx, b, "prod"), (3,), (4,), at=torch.tensor([1., 2, 3, 1, 0, 2, 3]))
case("scatter", lambda a, b: a.scatter(0, torch.tensor([0, 2]), b ** 2), (3,), (2,))
case("scatter_add", lambda a, b: a.scatter_add(0, idx, b ** 2), (3,), (4,))
case("segment_reduce sum", lambda a: torch.segment_reduce(a, "sum", lengths=torch.tensor([2, 2])), (4,))
case("segment_reduce mean", lambda a: torch.segment_reduce(a, "mean", lengths=torch.tensor([2, 2])), (4,))
case("segment_reduce max", lambda a: torch.segment_reduce(a, "max", lengths=torch.tensor([2, 2])), (4,))
case("segment_reduce prod", lambda a: torch.segment_reduce(a, "prod", lengths=torch.tensor([2, 2])), (4,))
case("repeat_interleave", lambda a: a.repeat_interleave(torch.tensor([1, 2, 3]), 0) ** 2, M)
case("unfold", lambda a: a.unfold(1, 2, 1) ** 2, M)
case("as_strided", lambda a: a.as_strided((3, 2), (2, 1)) ** 2, (12,))
case("roll/flip/rot90", lambda a: torch.rot90(a.roll(1, 0).flip(1)) * a.mT, M)
case("diag_embed", lambda a: torch.diag_embed(a) @ torch.diag_embed(a), M)
case("diagonal_scatter", lambda a, b: a.diagonal_scatter(b ** 2), S, (3,))
case("slice_scatter", lambda a, b: a.slice_scatter(b ** 2, 0, 0, 1), M, (1, 4))
case("select_scatter", lambda a, b: a.select_scatter(b ** 2, 0, 1), M, (4,))
case("tril/triu", lambda a: a.tril() @ a.triu(), S)
case("combinations", lambda a: torch.combinations(a).prod(1), (4,))
case("cartesian", lambda a, b: torch.cartesian_prod(a, b).prod(1), (3,), (2,))
case("block_diag", lambda a, b: torch.block_diag(a, b) @ torch.block_diag(b, a), (2, 2), (2, 2))
case("in-place", lambda a: a.clone().mul_(a).add_(a).exp_())
case("in-place index", lambda a: (lambda z: (z.__setitem__((slice(0, 3),), a[3:6] ** 2), z * a)[1])(a.clone()))
case("foreach mul", lambda a, b: torch.stack(torch._foreach_mul([a, b], [b, b])), (3,), (3,))
case("foreach norm", lambda a, b: torch.stack(torch._foreach_norm([a, b])), (3,), (3,))
case("nested jagged", lambda a, b: torch.nested.nested_tensor_from_jagged(a, torch.tensor([0, 1, 3])).sin().values() * b, (3, 2), (3, 2))
# activations
ACT = dict(elu=F.elu, selu=F.selu, celu=F.celu, gelu=F.gelu, gelu_tanh=lambda t: F.gelu(t, approximate="tanh"), silu=F.silu, mish=F.mish, softplus=F.softplus, softplus_beta=lambda t: F.softplus(t, 3.0, 2.0), softsign=F.softsign, tanhshrink=F.tanhshrink, logsigmoid=F.logsigmoid, hardtanh=F.hardtanh, hardswish=F.hardswish, hardsigmoid=F.hardsigmoid, hardshrink=F.hardshrink, softshrink=F.softshrink, leaky_relu=F.leaky_relu, relu6=F.relu6, threshold=lambda t: F.threshold(t, 0.1, 2.0), elu_alpha=lambda t: F.elu(t, 1.7), celu_alpha=lambda t: F.celu(t, 1.7), elu_=lambda t: F.elu(t * 1.0, inplace=True), silu_=lambda t: F.silu(t * 1.0, inplace=True), mish_=lambda t: F.mish(t * 1.0, inplace=True), selu_=lambda t: F.selu(t * 1.0, inplace=True), celu_=lambda t: F.celu(t * 1.0, inplace=True), celu_alpha_=lambda t: F.celu(t * 1.0, 1.7, inplace=True), leaky_=lambda t: F.leaky_relu(t * 1.0, 0.3, inplace=True), hardswish_=lambda t: F.hardswish(t * 1.0, inplace=True), rrelu_eval=lambda t: F.rrelu(t, training=False), softmax=lambda t: F.softmax(t, 0), log_softmax=lambda t: F.log_softmax(t, 0), softmin=lambda t: F.softmin(t, 0), glu=lambda t: F.glu(t, 0))
for k, f in ACT.items():
    case(f"F.{k}", lambda t, f=f: f(t * 2))
def rrelu(t):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0); return F.rrelu(t, training=True) ** 2
case("F.rrelu train", rrelu)
def gumbel(t, hard):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0); return F.gumbel_softmax(t, hard=hard)
case("F.gumbel_softmax", lambda t: gumbel(t, False))
case("F.prelu", lambda t, w: F.prelu(t, w), (2, 3), (3,))
# losses
T = torch.randn(3, 4, generator=g)
lab = torch.tensor([0, 3, 1])
W4 = torch.rand(4, generator=g) + 0.5
for red in ("mean", "sum", "none"):
    case(f"mse {red}", lambda a, t, r=red: F.mse_loss(a, t, reduction=r), M, M)
    case(f"l1 {red}", lambda a, t, r=red: F.l1_loss(a, t, reduction=r) ** 2, M, M)
    case(f"smooth_l1 {red}", lambda a, t, r=red: F.smooth_l1_loss(a, t, reduction=r, beta=1.3), M, M)
    case(f"huber {red}", lambda a, t, r=red: F.huber_loss(a, t, reduction=r, delta=1.3), M, M)
    case(f"cross_entropy {red}", lambda a, r=red: F.cross_entropy(a, lab, weight=W4, reduction=r, label_smoothing=0.1), M)
    case(f"cross_entropy probs {red}", lambda a, t, r=red: F.cross_entropy(a, t.softmax(1), weight=W4, reduction=r, label_smoothing=0.1), M, M)
    case(f"cross_entropy weight grad {red}", lambda a, w, r=red: F.cross_entropy(a, lab, weight=pos(w), reduction=r), M, (4,))
    case(f"nll {red}", lambda a, r=red: F.nll_loss(a.log_softmax(1), lab, weight=W4, reduction=r), M)
    case(f"nll2d {red}", lambda a, r=red: F.nll_loss(a.log_softmax(1), torch.tensor([[[0, 2]], [[1, 1]]]), weight=W4[:3], reduction=r, ignore_index=2), (2, 3, 1, 2))
    case(f"bce {red}", lambda a, t, r=red: F.binary_cross_entropy(a.sigmoid(), t.sigmoid(), weight=W4, reduction=r), M, M)
    case(f"bce weight grad {red}", lambda a, t, w, r=red: F.binary_cross_entropy(a.sigmoid(), t.sigmoid(), weight=pos(w), reduction=r), M, M, M)
    case(f"bce logits {red}", lambda a, t, r=red: F.binary_cross_entropy_with_logits(a, t.sigmoid(), weight=W4, pos_weight=W4, reduction=r), M, M)
    case(f"bce logits weights grad {red}", lambda a, t, w, p, r=red: F.binary_cross_entropy_with_logits(a, t.sigmoid(), weight=pos(w), pos_weight=pos(p), reduction=r), M, M, M, (4,))
    case(f"kl_div {red}", lambda a, t, r=red: F.kl_div(a.log_softmax(1), t.softmax(1), reduction=r), M, M)
    case(f"kl_div log_target {red}", lambda a, t, r=red: F.kl_div(a.log_softmax(1), t.log_softmax(1), reduction=r, log_target=True), M, M)
    case(f"poisson_nll {red}", lambda a, t, r=red: F.poisson_nll_loss(a, pos(t), full=True, reduction=r), M, M)
    case(f"gaussian_nll {red}", lambda a, t, v, r=red: F.gaussian_nll_loss(a, t, pos(v), full=True, reduction=r), M, M, M)
    case(f"soft_margin {red}", lambda a, r=red: F.soft_margin_loss(a, T.sign(), reduction=r), M)
    case(f"hinge_embedding {red}", lambda a, r=red: F.hinge_embedding_loss(a, T.sign(), reduction=r) ** 2, M)
    case(f"multilabel_margin {red}", lambda a, r=red: F.multilabel_margin_loss(a, torch.tensor([[0, 1, -1, -1], [2, -1, 0, 0], [3, 1, -1, 0]]), reduction=r) ** 2, M)
    case(f"multilabel_soft_margin {red}", lambda a, r=red: F.multilabel_soft_margin_loss(a, (T > 0) * 1.0, reduction=r), M)
    case(f"multi_margin {red}", lambda a, r=red: F.multi_margin_loss(a, lab, reduction=r) ** 2, M)
    case(f"multi_margin p2 {red}", lambda a, r=red: F.multi_margin_loss(a, lab, p=2, reduction=r), M)
    case(f"margin_ranking {red}", lambda a, b, r=red: F.margin_ranking_loss(a, b, T[0].sign(), reduction=r) ** 2, (4,), (4,))
    case(f"cosine_embedding {red}", lambda a, b, r=red: F.cosine_embedding_loss(a, b, torch.tensor([1., -1., 1.]), reduction=r), M, M)
    case(f"triplet {red}", lambda a, b, c, r=red: F.triplet_margin_loss(a, b, c, margin=5.0, reduction=r), M, M, M)
    case(f"triplet swap p3 {red}", lambda a, b, c, r=red: F.triplet_margin_loss(a, b, c, margin=5.0, p=3, swap=True, reduction=r), M, M, M)
    case(f"ctc {red}", lambda a, r=red: F.ctc_loss(a.log_softmax(-1), torch.tensor([[1, 1]]), torch.tensor([5]), torch.tensor([2]), reduction=r), (5, 1, 3))
case("huber target at kink 0", lambda a: F.huber_loss(a, torch.zeros(4)), (4,), at=torch.tensor([0., 0.5, -0.3, 0.2]))
case("adaptive softmax", lambda a: (lambda m: m(a, lab).loss)(build(lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2]))), M)
# norms
case("layer_norm", lambda a, w, b: F.layer_norm(a, (4,), w, b), M, (4,), (4,))
case("layer_norm no affine", lambda a: F.layer_norm(a, (4,)), M)
case("layer_norm weight only", lambda a, w: F.layer_norm(a, (4,), w), M, (4,))
case("rms_norm", lambda a, w: F.rms_norm(a, (4,), w), M, (4,))
case("rms_norm no weight", lambda a: F.rms_norm(a, (4,)), M)
case("group_norm", lambda a, w, b: F.group_norm(a, 2, w, b), (2, 4, 3), (4,), (4,))
case("group_norm no affine", lambda a: F.group_norm(a, 2), (2, 4, 3))
case("instance_norm", lambda a, w, b: F.instance_norm(a, weight=w, bias=b), (2, 3, 4), (3,), (3,))
case("batch_norm train", lambda a, w, b: F.batch_norm(a, None, None, w, b, True), (5, 3), (3,), (3,))
case("batch_norm train no affine", lambda a: F.batch_norm(a, None, None, training=True), (5, 3))
case("batch_norm eval", lambda a, w, b: F.batch_norm(a, torch.ones(3) * 0.3, torch.ones(3) * 2, w, b), (5, 3), (3,), (3,))
case("batch_norm eval no affine", lambda a: F.batch_norm(a, torch.ones(3) * 0.3, torch.ones(3) * 2), (5, 3))
case("batch_norm train with stats", lambda a, w, b: F.batch_norm(a, torch.zeros(3), torch.ones(3), w, b, True), (5, 3), (3,), (3,))
case("batch_norm conv", lambda a, w, b: F.batch_norm(a, None, None, w, b, True), (2, 3, 2, 2), (3,), (3,))
case("local_response_norm", lambda a: F.local_response_norm(a, 2), (2, 3, 4))
# conv, pooling, padding, upsampling
IM = (1, 2, 6, 6)
case("conv1d", lambda a, w, b: F.conv1d(a, w, b, 2, 1), (2, 2, 5), (3, 2, 3), (3,))
case("conv2d", lambda a, w, b: F.conv2d(a, w, b, 2, 1), (2, 2, 4, 4), (3, 2, 3, 3), (3,))
case("conv2d groups dilated", lambda a, w: F.conv2d(a, w, None, 1, 1, 2, 2), (1, 2, 5, 5), (2, 1, 2, 2))
case("conv3d", lambda a, w, b: F.conv3d(a, w, b), (1, 2, 3, 3, 3), (2, 2, 2, 2, 2), (2,))
case("conv_transpose2d", lambda a, w, b: F.conv_transpose2d(a, w, b, 2, 1, 1), (1, 2, 3, 3), (2, 2, 3, 3), (2,))
case("conv_transpose1d", lambda a, w, b: F.conv_transpose1d(a, w, b, 2), (1, 2, 3), (2, 2, 3), (2,))
case("conv_tbc", lambda a, w, b: torch.conv_tbc(a, w, b), (5, 1, 2), (2, 2, 3), (3,))
case("fold", lambda a: F.fold(a ** 2, (3, 3), (2, 2)), (1, 4, 4))
case("unfold im", lambda a: F.unfold(a, (2, 2)) ** 2, IM)
for n, f in dict(max_pool1d=lambda a: F.max_pool1d(a[0], 2), max_pool2d=lambda a: F.max_pool2d(a, 2), max_pool3d=lambda a: F.max_pool3d(a[None], (1, 2, 2)), avg_pool1d=lambda a: F.avg_pool1d(a[0], 2), avg_pool2d=lambda a: F.avg_pool2d(a, 3, 2, 1, count_include_pad=False), avg_pool3d=lambda a: F.avg_pool3d(a[None], (1, 2, 2)), adaptive_avg_pool2d=lambda a: F.adaptive_avg_pool2d(a, (4, 3)), adaptive_avg_pool1d=lambda a: F.adaptive_avg_pool1d(a[0], 4), adaptive_avg_pool3d=lambda a: F.adaptive_avg_pool3d(a[None], (2, 4, 3)), adaptive_max_pool2d=lambda a: F.adaptive_max_pool2d(a, (4, 3)), adaptive_max_pool1d=lambda a: F.adaptive_max_pool1d(a[0], 4), adaptive_max_pool3d=lambda a: F.adaptive_max_pool3d(a[None], (2, 4, 3)), lp_pool2d=lambda a: F.lp_pool2d(a.abs(), 3, 2), lp_pool1d=lambda a: F.lp_pool1d(a[0].abs(), 2, 2), lp_pool3d=lambda a: F.lp_pool3d(a[None].abs(), 2, (1,2,2)),
    max_unpool2d=lambda a: F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2), max_pool2d_overlap=lambda a: F.max_pool2d(a, 3, 1),
    frac_max_pool2d=lambda a: F.fractional_max_pool2d(a, 2, output_size=3, _random_samples=torch.full((1, 2, 2), 0.3)), frac_max_pool3d=lambda a: F.fractional_max_pool3d(a[None], (1, 2, 2), output_size=(2, 3, 3), _random_samples=torch.full((1, 1, 3), 0.3)),
    pad_reflect=lambda a: F.pad(a, (1, 2, 2, 1), "reflect"), pad_replicate=lambda a: F.pad(a, (1, 2, 2, 1), "replicate"), pad_circular=lambda a: F.pad(a, (1, 2, 2, 1), "circular"), pad_constant=lambda a: F.pad(a, (1, 2, 2, 1)), pad_reflect1d=lambda a: F.pad(a[0], (1, 2), "reflect"), pad_reflect3d=lambda a: F.pad(a[None], (1, 2, 1, 1, 1, 1), "reflect"), pad_replicate3d=lambda a: F.pad(a[None], (1, 2, 1, 1, 1, 1), "replicate"),
    up_nearest=lambda a: F.interpolate(a, scale_factor=1.5, mode="nearest"), up_nearest_exact=lambda a: F.interpolate(a, size=(4, 8), mode="nearest-exact"), up_bilinear=lambda a: F.interpolate(a, scale_factor=1.5, mode="bilinear"), up_bicubic=lambda a: F.interpolate(a, scale_factor=1.5, mode="bicubic"), up_bilinear_aa=lambda a: F.interpolate(a, size=(4, 3), mode="bilinear", antialias=True), up_bicubic_aa=lambda a: F.interpolate(a, size=(4, 3), mode="bicubic", antialias=True), up_area=lambda a: F.interpolate(a, size=(4, 3), mode="area"), up_linear=lambda a: F.interpolate(a[0], scale_factor=1.5, mode="linear"), up_trilinear=lambda a: F.interpolate(a[None], scale_factor=1.5, mode="trilinear"),
    pixel_shuffle=lambda a: F.pixel_shuffle(a.reshape(1, 4, 3, 6), 2), pixel_unshuffle=lambda a: F.pixel_unshuffle(a, 2), channel_shuffle=lambda a: F.channel_shuffle(a, 2)).items():
    case(n, lambda a, f=f: f(a) ** 2, IM)
for mode in ("bilinear", "nearest", "bicubic"):
    for pad in ("zeros", "border", "reflection"):
        case(f"grid_sample {mode} {pad}", lambda a, gr, m=mode, p=pad: F.grid_sample(a, gr.tanh(), mode=m, padding_mode=p, align_corners=False), (1, 2, 3, 3), (1, 2, 2, 2))
        case(f"grid_sample {mode} {pad} image only", lambda a, m=mode, p=pad: F.grid_sample(a, R(1, 2, 2, 2).tanh() * 0 + 0.3, mode=m, padding_mode=p, align_corners=False), (1, 2, 3, 3))
case("grid_sample 3d", lambda a, gr: F.grid_sample(a, gr.tanh(), align_corners=False), (1, 1, 2, 2, 2), (1, 1, 1, 2, 3))
case("affine_grid", lambda t: F.affine_grid(t, [1, 1, 2, 2], align_corners=False), (1, 2, 3))
case("affine_grid + grid_sample", lambda a, t: F.grid_sample(a, F.affine_grid(t * 0.3, [1, 1, 3, 3], align_corners=False), align_corners=False), (1, 1, 3, 3), (1, 2, 3))
# embeddings
ids = torch.tensor([[0, 1, 1], [2, 1, 0]])
case("embedding", lambda w: F.embedding(ids, w), M)
case("embedding padding_idx", lambda w: F.embedding(ids, w, padding_idx=1), M)
case("embedding scale_grad_by_freq", lambda w: F.embedding(ids, w, scale_grad_by_freq=True), M)
case("embedding sparse", lambda w: F.embedding(ids, w, sparse=True), M)
for m in ("sum", "mean", "max"):
    case(f"embedding_bag {m}", lambda w, m=m: F.embedding_bag(ids, w, mode=m), M)
    case(f"embedding_bag {m} scale", lambda w, m=m: F.embedding_bag(ids, w, mode=m, scale_grad_by_freq=True), M)
case("embedding_bag sparse", lambda w: F.embedding_bag(ids, w, mode="sum", sparse=True), M)
case("embedding_bag weights", lambda w, s: F.embedding_bag(ids, w, mode="sum", per_sample_weights=s), M, (2, 3))
case("one-hot matmul", lambda w: F.one_hot(ids, 3).double() @ w, M)
# attention
from torch.nn.attention import SDPBackend, sdpa_kernel

QKV = ((1, 2, 3, 2),) * 3
case("sdpa default", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *QKV)
case("sdpa causal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *QKV)
case("sdpa float mask", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), *QKV, (3, 3))
case("sdpa bool mask", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(3, 3).tril().bool()), *QKV)
case("sdpa 3-d", lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), *QKV)
def back(b):
    def f(q, k, v):
        with sdpa_kernel(b): return F.scaled_dot_product_attention(q, k, v)
    return f
for b in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
    case(f"sdpa {b.name}", back(b), *QKV)
case("sdpa gqa", lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), (1, 4, 3, 2), (1, 2, 3, 2))
def flex(q, k, v):
    from torch.nn.attention.flex_attention import flex_attention
    return flex_attention(q, k, v)
case("flex_attention", flex, *QKV)
case("multi_head_attention_forward", lambda q, w, b, o: F.multi_head_attention_forward(q, q, q, 4, 2, w, b, None, None, False, 0.0, o, None)[0], (3, 1, 4), (12, 4), (12,), (4, 4))
# modules
for tr in (True, False):
    s = "train" if tr else "eval"
    module(f"nn.LSTM {s}", lambda: nn.LSTM(2, 2, 2, dropout=0.3), (3, 1, 2), train=tr, out=lambda o: torch.cat([o[0].reshape(-1), o[1][0].reshape(-1), o[1][1].reshape(-1)]))
    module(f"nn.LSTM bidir proj {s}", lambda: nn.LSTM(2, 3, bidirectional=True, proj_size=2), (3, 1, 2), train=tr, out=lambda o: o[0])
    module(f"nn.GRU {s}", lambda: nn.GRU(2, 2, bidirectional=True), (3, 1, 2), train=tr, out=lambda o: o[0])
    module(f"nn.RNN {s}", lambda: nn.RNN(2, 2), (3, 1, 2), train=tr, out=lambda o: o[0])
    module(f"nn.RNN relu {s}", lambda: nn.RNN(2, 2, nonlinearity="relu"), (3, 1, 2), train=tr, out=lambda o: o[0])
    module(f"nn.MultiheadAttention {s}", lambda: nn.MultiheadAttention(4, 2, dropout=0.2), *(((3, 1, 4),) * 3), train=tr, out=lambda o: o[0])
    module(f"nn.MultiheadAttention noweights {s}", lambda: (lambda m: m)(nn.MultiheadAttention(4, 2)), *(((3, 1, 4),) * 3), train=tr, out=lambda o: o[0], extra=(None, False))
    module(f"nn.TransformerEncoderLayer {s}", lambda: nn.TransformerEncoderLayer(4, 2, 4, dropout=0.1), (3, 1, 4), train=tr)
    module(f"nn.TransformerDecoderLayer {s}", lambda: nn.TransformerDecoderLayer(4, 2, 4, dropout=0.1), (3, 1, 4), (2, 1, 4), train=tr)
    module(f"nn.Transformer {s}", lambda: nn.Transformer(4, 2, 1, 1, 4), (3, 1, 4), (2, 1, 4), train=tr)
    module(f"nn.BatchNorm1d {s}", lambda: nn.BatchNorm1d(3), (5, 3), train=tr)
    module(f"nn.InstanceNorm1d stats {s}", lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (2, 3, 4), train=tr)
    module(f"weight_norm new {s}", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (2, 3), train=tr)
    module(f"spectral_norm new {s}", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), (2, 3), train=tr)
    module(f"spectral_norm old {s}", lambda: nn.utils.spectral_norm(nn.Linear(3, 2)), (2, 3), train=tr)
    module(f"weight_norm old {s}", lambda: nn.utils.weight_norm(nn.Linear(3, 2)), (2, 3), train=tr)
    for om in ("matrix_exp", "cayley", "householder"):
        module(f"orthogonal {om} {s}", lambda om=om: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map=om), (2, 3), train=tr)
    for nm, mk in dict(Dropout=lambda: nn.Dropout(0.5), AlphaDropout=lambda: nn.AlphaDropout(0.5), FeatureAlphaDropout=lambda: nn.FeatureAlphaDropout(0.5)).items():
        module(f"nn.{nm} {s}", lambda mk=mk: nn.Sequential(nn.Linear(3, 4), mk(), nn.Tanh()), (2, 3), train=tr)
module("nn.LSTMCell", lambda: nn.LSTMCell(2, 2), (1, 2), out=lambda o: torch.cat(o))
module("nn.GRUCell", lambda: nn.GRUCell(2, 2), (1, 2))
module("nn.RNNCell", lambda: nn.RNNCell(2, 2), (1, 2))
module("nn.Bilinear", lambda: nn.Bilinear(2, 2, 2), (3, 2), (3, 2))
module("nn.CrossMapLRN2d", lambda: nn.CrossMapLRN2d(2), (1, 3, 2, 2))
module("nn.FractionalMaxPool2d", lambda: nn.FractionalMaxPool2d(2, 3), (1, 2, 6, 6))
# functions of functions
from torch.utils.checkpoint import checkpoint

case("checkpoint", lambda a: checkpoint(lambda t: t.sin() * t.exp(), a, use_reentrant=False))
case("checkpoint reentrant", lambda a: checkpoint(lambda t: t.sin() * t.exp(), a, use_reentrant=True))
def autocast(a):
    with torch.autocast("cpu"):
        return (a.float() @ a.float()).double()
case("autocast, float32 dot product", autocast)
@torch.jit.script
def scripted(t):
    return t.sin() * t.exp() + torch.sigmoid(t) * t
case("jit.script", lambda a: scripted(a))
jitt = torch.jit.trace(lambda t: t.sin() * t.exp(), torch.ones(12))
case("jit.trace", lambda a: jitt(a))
comp = torch.compile(lambda t: t.sin() * t.exp(), backend="aot_eager")
case("torch.compile aot_eager", lambda a: comp(a))
compe = torch.compile(lambda t: t.sin() * t.exp(), backend="eager")
case("torch.compile eager", lambda a: compe(a))
case("torch.func.grad inside", lambda a: torch.func.grad(lambda t: (t.sin() * t).sum())(a), (4,))
case("torch.func.jvp inside", lambda a: torch.func.jvp(lambda t: t.sin() * t, (a,), (torch.ones(4),))[1], (4,))
case("torch.func.vjp inside", lambda a: (lambda o, f: f(o)[0])(*torch.func.vjp(lambda t: t.sin() * t, a)), (4,))
case("torch.func.jacrev inside", lambda a: torch.func.jacrev(lambda t: t.sin() * t)(a), (4,))
case("torch.func.jacfwd inside", lambda a: torch.func.jacfwd(lambda t: t.sin() * t)(a), (4,))
case("torch.func.hessian inside", lambda a: torch.func.hessian(lambda t: (t.sin() * t).sum())(a), (4,))
case("vmap inside", lambda a: torch.vmap(lambda t: t.sin() * t)(a), M)
case("autograd.functional.hvp inside", lambda a: torch.autograd.functional.hvp(lambda t: (t ** 3).sum(), a, torch.ones(4), create_graph=True)[1], (4,))
case("autograd.grad inside", lambda a: torch.autograd.grad((a ** 3).sum(), a, create_graph=True)[0] if a.requires_grad else 3 * a ** 2, (4,))
case("forward_ad inside", lambda a: dual(a), (4,))
def dual(a):
    import torch.autograd.forward_ad as fw
    with fw.dual_level():
        return fw.unpack_dual((fw.make_dual(a, torch.ones(4))).sin() * 2)[1]
def cond(a):
    return torch.cond(torch.tensor(True), lambda t: t.sin() * t, lambda t: t.cos(), (a,))
case("torch.cond", cond, (4,))
def wl(a):
    from torch._higher_order_ops import while_loop
    return while_loop(lambda i, t: i < 2, lambda i, t: (i + 1, t.sin() * t), (torch.tensor(0), a))[1]
case("while_loop", wl, (4,))
def asc(a):
    from torch._higher_order_ops import associative_scan
    return associative_scan(torch.mul, a, 0, combine_mode="generic")
case("associative_scan", asc, (4,))
def hscan(a):
    from torch._higher_order_ops import scan
    return scan(lambda c, x: (c * x.sin(), c * x), torch.tensor(1.5), a)[1]
case("scan", hscan, (4,))
# custom functions
@torch.library.custom_op("svy::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x ** 3
cube.register_autograd(lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
case("custom_op", lambda a: cube(a))
class Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach(); return x ** 3
    @staticmethod
    def backward(ctx, g): return g * 3 * ctx.x ** 2
case("custom Function, ctx attribute detached", lambda a: Save.apply(a))
class SaveI(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp(); ctx.y = y; return y
    @staticmethod
    def backward(ctx, g): return g * ctx.y
case("custom Function, ctx attribute output", lambda a: SaveI.apply(a))
class SaveM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        c = x.cos(); ctx.save_for_backward(c); return x.sin()
    @staticmethod
    def backward(ctx, g): return g * ctx.saved_tensors[0]
case("custom Function, saved intermediate", lambda a: SaveM.apply(a))
class NG(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x); return x ** 3
    @staticmethod
    def backward(ctx, g):
        with torch.no_grad(): return g * 3 * ctx.saved_tensors[0] ** 2
case("custom Function, backward in no_grad", lambda a: NG.apply(a))
# sparse
def sp(a): return torch.sparse_coo_tensor(torch.tensor([[0, 1, 2], [1, 0, 2]]), a, (3, 3))
case("sparse.mm", lambda a, b: torch.sparse.mm(sp(a), b), (3,), (3, 2))
case("sparse @ dense", lambda a, b: sp(a) @ b, (3,), (3, 2))
case("sparse.addmm", lambda c, a, b: torch.sparse.addmm(c, sp(a), b), (3, 2), (3,), (3, 2))
case("sparse.sum", lambda a: torch.sparse.sum(sp(a)) ** 2, (3,))
case("sparse to_dense", lambda a: sp(a).to_dense() ** 2, (3,))
case("sparse.softmax", lambda a: torch.sparse.softmax(sp(a), 1).to_dense(), (3,))
case("sparse.log_softmax", lambda a: torch.sparse.log_softmax(sp(a), 1).coalesce().values(), (3,))
case("sparse coalesce values", lambda a: sp(a).coalesce().values() ** 2, (3,))
case("sparse mul", lambda a, b: (sp(a) * sp(b)).to_dense(), (3,), (3,))
case("sparse constant @ dense", lambda b: sp(torch.ones(3)) @ b, (3, 2))
case("csr constant @ dense", lambda b: sp(torch.ones(3)).to_sparse_csr() @ b, (3, 2))
case("csr @ dense", lambda a, b: torch.sparse_csr_tensor(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 2]), a, (3, 3)) @ b, (3,), (3, 2))
case("sparse mm sparse", lambda a, b: torch.sparse.mm(sp(a), sp(b)).to_dense(), (3,), (3,))
case("sparse spmv", lambda a, b: torch.mv(sp(a), b), (3,), (3,))
case("sparse bmm", lambda a, b: torch.bmm(torch.stack([sp(a)]), b), (3,), (1, 3, 2))
case("sparse_mask", lambda a: a.sparse_mask(sp(torch.ones(3)).coalesce()).to_dense() ** 2, (3, 3))
case("to_sparse", lambda a: torch.sparse.sum(a.to_sparse(), 1).to_dense() ** 2, (3, 3))
# distributions
D = torch.distributions
case("Normal.log_prob", lambda m, s: D.Normal(m, pos(s), validate_args=False).log_prob(torch.ones(3)), (3,), (3,))
case("kl Normal", lambda m, s: D.kl_divergence(D.Normal(m, pos(s), validate_args=False), D.Normal(0., 1.)), (3,), (3,))
case("MVN.log_prob", lambda m, s: D.MultivariateNormal(m, spd(s), validate_args=False).log_prob(torch.ones(3)), (3,), (3, 3))
case("Beta/Gamma/Dirichlet log_prob", lambda a: D.Beta(pos(a[0]), pos(a[1]), validate_args=False).log_prob(torch.tensor(0.3)) + D.Gamma(pos(a[0]), pos(a[1]), validate_args=False).log_prob(torch.tensor(0.3)) + D.Dirichlet(pos(a), validate_args=False).log_prob(torch.full((3,), 1 / 3)), (3,))
case("StudentT log_prob", lambda a: D.StudentT(pos(a[0]), a[1], pos(a[2]), validate_args=False).log_prob(torch.tensor(0.3)), (3,))
case("VonMises log_prob", lambda a: D.VonMises(a[0], pos(a[1]), validate_args=False).log_prob(torch.tensor(0.3)), (3,))
def rs(mk):
    def f(a):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0); return mk(a).rsample((2,))
    return f
case("Normal rsample", rs(lambda a: D.Normal(a[0], pos(a[1]), validate_args=False)), (3,))
case("Gamma rsample", rs(lambda a: D.Gamma(pos(a) + 1, torch.ones(3), validate_args=False)), (3,))
case("Beta rsample", rs(lambda a: D.Beta(pos(a[0]), pos(a[1]), validate_args=False)), (3,))
case("Dirichlet rsample", rs(lambda a: D.Dirichlet(pos(a), validate_args=False)), (3,))
case("Wishart log_prob", lambda a: D.Wishart(torch.tensor(5.0), spd(a), validate_args=False).log_prob(I3), S)
case("fake_quantize", lambda a: torch.fake_quantize_per_tensor_affine(a, 0.001, 0, -128000, 127000) ** 2)
case("bernoulli st", lambda a: (a.sigmoid().round() - a.sigmoid()).detach() + a.sigmoid())
case("to float32 and back", lambda a: a.float().double() ** 3)
case("view_as_complex", lambda a: torch.view_as_complex(a.reshape(6, 2)).abs(), (12,))
case("cummax ties", lambda a: a.cummax(0)[0], (4,))
case("histc-like bucketize", lambda a: torch.bucketize(a, torch.arange(3.0)) * a ** 2)
case("smooth_l1 beta 0", lambda a, b: F.smooth_l1_loss(a, b, beta=0.0, reduction="sum") ** 2, (3,), (3,))
case("logsumexp -inf", lambda a: torch.logsumexp(torch.cat([a, torch.tensor([-math.inf])]), 0))
case("softmax -inf", lambda a: torch.cat([a, torch.tensor([-math.inf])]).softmax(0))
case("where nan trap", lambda a: torch.where(a > 0, a.clamp_min(1e-3).sqrt(), a ** 2))
case("renorm, all rows", lambda t: torch.renorm(t * 5, 2, 0, 1.0), M)
case("addmm activation", lambda c, a, b: torch._addmm_activation(c, a, b), (3,), (2, 3), (3, 3))
case("native_channel_shuffle", lambda a: torch.native_channel_shuffle(a, 2) ** 2, IM)
case("unsafe_index", lambda a: torch.ops.aten._unsafe_index(a, [idx]) ** 2, M)
case("logaddexp equal", lambda a, b: torch.logaddexp(a, b), (2,), (2,), at=torch.tensor([1., 2., 1., 2.]))
case("atan2 axis", lambda a, b: torch.atan2(a, b), (2,), (2,), at=torch.tensor([0., 2., 1., 0.]))
case("huber_at_zero", lambda a: F.huber_loss(a, torch.zeros(3), reduction="sum"), (3,), at=torch.zeros(3))
case("smooth_l1 at zero", lambda a: F.smooth_l1_loss(a, torch.zeros(3), reduction="sum"), (3,), at=torch.zeros(3))
for k in ("softplus", "gelu", "gelu_tanh", "silu", "mish", "softsign_sq", "tanhshrink", "logsigmoid"):
    f = (lambda t: F.softsign(t) ** 2) if k == "softsign_sq" else ACT[k]
    case(f"F.{k} at zero", lambda t, f=f: f(t), (3,), at=torch.zeros(3))
    case(f"F.{k} at +-40", lambda t, f=f: f(t), (4,), at=torch.tensor([40., -40., 90., -90.]))
case("bce saturated", lambda a: F.binary_cross_entropy(a.sigmoid(), torch.tensor([1., 0., 1., 0.])), (4,), at=torch.tensor([9., -9., 9., -9]))
case("bce logits saturated", lambda a: F.binary_cross_entropy_with_logits(a, torch.tensor([1., 0., 1., 0.])), (4,), at=torch.tensor([19., -19., 19., -19]))
case("cosine_similarity zero vec", lambda a, b: F.cosine_similarity(a, b, dim=0), (2,), (2,), at=torch.tensor([1., 2., 0., 0.]))
case("std of constants squared", lambda a: a.std() ** 2, (3,), at=torch.ones(3))
case("eigvalsh degenerate sum", lambda a: torch.linalg.eigvalsh((a + a.mT) / 2).sum() ** 2, S, at=torch.eye(3).reshape(-1))
case("eigh degenerate exp", lambda a: torch.linalg.eigvalsh((a + a.mT) / 2).exp().sum(), S, at=torch.eye(3).reshape(-1))
case("svdvals degenerate squares", lambda a: torch.linalg.svdvals(a).square().sum(), S, at=torch.eye(3).reshape(-1))
case("nuc degenerate", lambda a: torch.linalg.matrix_norm(a, "nuc"), S, at=torch.eye(3).reshape(-1))
case("pinv full rank square", lambda a: torch.linalg.pinv(a + 4 * I3), S)
case("matrix_norm 2", lambda a: torch.linalg.matrix_norm(a, 2), S)

for norm in ("conv", "linear"):
    case(
        f"_weight_norm {norm}",
        lambda v, g, n=norm: torch._weight_norm(v, g, 0),
        (2, 3, 2) if norm == "conv" else (2, 3),
        (2, 1, 1) if norm == "conv" else (2, 1),
    )
case("_weight_norm last dim", lambda v, g: torch._weight_norm(v, g, 1), (2, 3), (1, 3))
case("weight norm written out", lambda v, g: v * (g / torch.norm_except_dim(v, 2, 0)), (2, 3), (2, 1))
case(
    "linear_cross_entropy",
    lambda a, w: (
        F.linear_cross_entropy(a, w, lab) if hasattr(F, "linear_cross_entropy") else F.cross_entropy(a @ w.T, lab)
    ),
    (3, 4),
    (4, 4),
)
case("conv_transpose3d", lambda a, w: F.conv_transpose3d(a, w), (1, 2, 2, 2, 2), (2, 2, 2, 2, 2))
case("max_unpool1d", lambda a: F.max_unpool1d(*F.max_pool1d(a, 2, return_indices=True), 2) ** 2, (1, 2, 6))
case("max_unpool3d", lambda a: F.max_unpool3d(*F.max_pool3d(a, 2, return_indices=True), 2) ** 2, (1, 1, 4, 4, 4))
case(
    "triplet with distance",
    lambda a, b, c: F.triplet_margin_with_distance_loss(a, b, c, margin=5.0),
    (3, 4),
    (3, 4),
    (3, 4),
)
case("upsample", lambda a: F.upsample(a, scale_factor=2, mode="bilinear") ** 2, (1, 1, 3, 3))
case("vecdot", lambda a, b: torch.linalg.vecdot(a, b), (3, 4), (3, 4))
case("tensorinv", lambda a: torch.linalg.tensorinv((a + 4 * I3).reshape(3, 3, 1), ind=1), S)
case("multigammaln", lambda a: torch.special.multigammaln(a.abs() + 2, 2))


def packed(w_ih, w_hh, x):
    made = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]))
    cell = nn.RNN(2, 2, bias=False)
    return torch.func.functional_call(cell, {"weight_ih_l0": w_ih, "weight_hh_l0": w_hh}, (made,))[0].data


case("packed RNN", packed, (2, 2), (2, 2), (3, 2, 2))
case(
    "sparse csr to_dense",
    lambda a: torch.sparse_csr_tensor(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 2]), a, (3, 3)).to_dense() ** 2,
    (3,),
)
# fmt: on


def start(name):
    """The point of a case, flat, and its function of one vector."""
    function, shapes, at = CASES[name]
    sizes = [math.prod(shape) for shape in shapes]
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(sum(sizes), generator=generator) * 0.7
    if isinstance(at, Tensor):
        y = at.clone()
    elif at is not None and at[1]:
        own = torch.cat([parameter.reshape(-1) for parameter in at[1]])
        y[: own.numel()] = own

    def loss(y):
        out = function(*[part.reshape(shape) for part, shape in zip(y.split(sizes), shapes, strict=True)])
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
        return (weights * out).sum() + out.square().sum() / 2

    return y, loss, torch.randn(len(y), generator=generator)


def gradient(loss, y):
    leaf = y.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def verdict(name):
    """(word, details) of a case."""
    y, loss, v = start(name)
    try:
        first = gradient(loss, y)
    except Exception as error:
        return "no gradient", str(error)
    try:
        leaf = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        found = torch.autograd.grad(slope, leaf, v, allow_unused=True)[0] if slope.requires_grad else None
    except Exception as error:
        return "raises", str(error)
    hv = torch.zeros_like(y) if found is None else found
    if not bool(hv.isfinite().all()):
        return "nan", ""
    second, by_values = math.inf, math.inf
    for t in (1e-4, 1e-5, 1e-6):
        differences = (gradient(loss, y + t * v) - gradient(loss, y - t * v)) / (2 * t)
        second = min(second, float((differences - hv).norm() / differences.norm().clamp_min(1e-8)))
        rise, claimed = float((loss(y + t * v) - loss(y - t * v)) / (2 * t)), float(first @ v)
        by_values = min(by_values, abs(rise - claimed) / max(abs(rise), float(first.norm()) / 100, 1e-8))
    details = f"second derivative off by {second:.0e}, first by {by_values:.0e}"
    if by_values > 1e-5:
        return "gradient wrong", details
    return ("right" if second < 1e-5 else "wrong"), details


def refusal(name):
    """What the library, or torch, says against a case; empty if it passes."""
    y, loss, _ = start(name)
    leaf = y.requires_grad_()
    try:
        grad(loss(leaf), leaf, create_graph=True)
    except RuntimeError as error:  # NotImplementedError is one
        return str(error)
    return ""


# What is wrong and passes: second derivatives at a kink, where there are none (torch takes those of one side, or zero),
# and what a function written by the user, or its layer, cuts off on purpose for all that can be seen.
AT_A_KINK = {
    "square of abs at 0",
    "complex abs^2 at 0",
    "i1e at 0",
    "vector_norm 1 one zero",
    "vector_norm 1 pow p one zero",
}
AT_A_KINK |= {f"vector_norm {p} {what} at 0" for p in (1, 3, 4) for what in ("squared", "pow p")}
CUT_OFF = {"custom Function, ctx attribute detached", "custom Function, saved intermediate"}
CUT_OFF |= {"custom Function, backward in no_grad", "spectral_norm new train"}
# What is right and refused: derivatives that happen to vanish, a matrix singular twice over.
BY_CHANCE = {"sparse.softmax", "sparse.log_softmax", "det rank 1"}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    words = sys.argv[1:]
    chosen = [name for name in CASES if not words or any(word in name for word in words)]
    for name in chosen:
        word, details = verdict(name)
        if words or word != "right":
            said = refusal(name) if word != "no gradient" else ""
            print(f"{name:42s} {word:15s} {'refused' if said else 'passes':8s} {details.partition(chr(10))[0][:110]}")
    print(f"{len(chosen)} cases")
