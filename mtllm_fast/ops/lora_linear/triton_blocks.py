"""What the Triton kernels of ``lora_linear`` are made of: functions of blocks of tokens and columns.

Names: ``i_`` index of a program or loop, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` a block of values.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(h, key):
    """The hash of ``masks.py``, of uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = h ^ key
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def token_keys(o_t, seed_low, seed_high, PAIR: tl.constexpr):
    """Both keys of each token, for the adapters 2 PAIR and 2 PAIR + 1."""
    zero = (o_t * 0).to(tl.uint32)
    step = zero + 0x9E3779B9
    b_base = mix(zero + seed_low.to(tl.uint32) + step * PAIR, zero)
    b_key0 = mix(o_t.to(tl.uint32) + b_base, zero)
    return b_key0, mix(b_key0 ^ seed_high.to(tl.uint32), zero)


@triton.jit
def hashes(b_key0, b_key1, o_k):
    """[tokens, columns]: 32 bits for two adapters."""
    b_k = o_k.to(tl.uint32)
    b_k = b_k * (b_k * 0 + 0x9E3779B9)
    return mix(b_k[None, :] + b_key0[:, None], b_key1[:, None])


@triton.jit
def dropped(b_x, b_hash, ADAPTER: tl.constexpr, THRESHOLD: tl.constexpr):
    """b_x, or 0 where the adapter's mask says so."""
    if THRESHOLD == 0:
        return b_x
    else:  # noqa: RET505 (decided when it is compiled)
        b_h = (b_hash << 16) if ADAPTER % 2 == 1 else b_hash
        return tl.where(b_h.to(tl.int32, bitcast=True) >= THRESHOLD * 65536 - 2147483648, b_x, 0.0)


@triton.jit
def multiply(b_left, b_right, b_acc, like, UPCAST: tl.constexpr):
    """b_acc + b_left b_right in the adapters' dtype; float32 as three products of TF32 parts, which is as accurate."""
    dtype: tl.constexpr = tl.float32 if UPCAST else like.dtype.element_ty  # the interpreter cannot multiply bfloat16
    return tl.dot(b_left.to(dtype), b_right.to(dtype), b_acc, input_precision="tf32x3")


@triton.jit
def contract(b_low, b_x, b_hash, a, o_k, K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, ADAPTER: tl.constexpr,
             THRESHOLD: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """b_low [BT, BR] + (m ⊙ x) Aᵀ of some columns of x."""
    o_r = tl.arange(0, BR)
    p_a = a + o_r[None, :] * K + o_k[:, None]  # Aᵀ [BK, BR]
    b_a = tl.load(p_a, mask=(o_r < R)[None, :] & (o_k < K)[:, None], other=0.0)
    return multiply(dropped(b_x, b_hash, ADAPTER, THRESHOLD), b_a, b_low, a, UPCAST)


@triton.jit
def expand(b_low, b, bias, y, low, scale, o_t, m_t, C: tl.constexpr, N: tl.constexpr, AT: tl.constexpr,
           WIDTH: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, RANKS: tl.constexpr,
           UPCAST: tl.constexpr):  # fmt: skip
    """Stores low = C b_low, rounded, at ``low`` and s low Bᵀ + bias in the adapter's columns of y."""
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    b_low = (b_low * C).to(low.dtype.element_ty)
    tl.store(low + o_t[:, None] * RANKS + o_r[None, :], b_low, mask=m_t[:, None] & m_r[None, :])
    for n in range(0, WIDTH, BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < WIDTH
        b_b = tl.load(b + o_n[None, :] * R + o_r[:, None], mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_y = multiply(b_low, b_b, tl.zeros([b_low.shape[0], BN], dtype=tl.float32), b, UPCAST) * scale
        if bias is not None:
            b_y += tl.load(bias + AT + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        p_y = y + o_t[:, None] * N + AT + o_n[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


@triton.jit
def contract_gradient(grad_y, b, d, scale, o_t, m_t, stride_y, BT: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr,
                      R: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, RANKS: tl.constexpr,
                      UPCAST: tl.constexpr):  # fmt: skip
    """d = s dy B [BT, BR], rounded, also stored at ``d``."""
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    b_d = tl.zeros([BT, BR], dtype=tl.float32)
    for n in range(0, WIDTH, BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < WIDTH
        b_g = tl.load(grad_y + o_t[:, None] * stride_y + AT + o_n[None, :], mask=m_t[:, None] & m_n[None, :], other=0.0)
        b_b = tl.load(b + o_n[:, None] * R + o_r[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0)
        b_d = multiply(b_g, b_b, b_d, b, UPCAST)
    b_d = (b_d * scale).to(d.dtype.element_ty)
    tl.store(d + o_t[:, None] * RANKS + o_r[None, :], b_d, mask=m_t[:, None] & m_r[None, :])
    return b_d


@triton.jit
def expand_gradient(b_d, b_hash, a, o_k, K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, ADAPTER: tl.constexpr,
                    THRESHOLD: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """m ⊙ (d A) of some columns."""
    o_r = tl.arange(0, BR)
    p_a = a + o_r[:, None] * K + o_k[None, :]
    b_a = tl.load(p_a, mask=(o_r < R)[:, None] & (o_k < K)[None, :], other=0.0)
    b_x = multiply(b_d, b_a, tl.zeros([b_d.shape[0], o_k.shape[0]], dtype=tl.float32), a, UPCAST)
    return dropped(b_x, b_hash, ADAPTER, THRESHOLD)


@triton.jit
def load_states(x, other, weight, o_t, o_k, stride_x, stride_other, mask, SOURCE: tl.constexpr):
    """x [BT, BK], computed again from its source and rounded to its dtype."""
    b_x = tl.load(x + o_t[:, None] * stride_x + o_k[None, :], mask=mask, other=0.0)
    if SOURCE == "rms_norm":
        b_rstd = tl.load(other + o_t, mask=tl.max(mask.to(tl.int32), 1) > 0, other=0.0)
        b_w = tl.load(weight + o_k, mask=tl.max(mask.to(tl.int32), 0) > 0, other=0.0).to(tl.float32)
        b_x = (b_x.to(tl.float32) * b_rstd[:, None] * b_w[None, :]).to(x.dtype.element_ty)
    if SOURCE == "swiglu":
        b_up = tl.load(other + o_t[:, None] * stride_other + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
        b_gate = b_x.to(tl.float32)
        b_x = (b_gate * tl.sigmoid(b_gate) * b_up).to(x.dtype.element_ty)
    return b_x


@triton.jit
def add_gradient(b_acc, b_left, d, o_t, m_t, R: tl.constexpr, BR: tl.constexpr, RANKS: tl.constexpr,
                 UPCAST: tl.constexpr):  # fmt: skip
    """b_acc + b_leftᵀ d: some tokens' part of [columns, BR]."""
    o_r = tl.arange(0, BR)
    b_d = tl.load(d + o_t[:, None] * RANKS + o_r[None, :], mask=m_t[:, None] & (o_r < R)[None, :], other=0.0)
    return multiply(tl.trans(b_left), b_d, b_acc, d, UPCAST)


@triton.jit
def gradient_of_b(grad_y, low, out, scale, i_n, first, last, stride_y, AT: tl.constexpr, WIDTH: tl.constexpr,
                  R: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, RANKS: tl.constexpr,
                  UPCAST: tl.constexpr):  # fmt: skip
    """s dyᵀ low of BN columns of an adapter and some tokens, into out [WIDTH, R]."""
    o_n, o_r = i_n * BN + tl.arange(0, BN), tl.arange(0, BR)
    m_n = o_n < WIDTH
    b_acc = tl.zeros([BN, BR], dtype=tl.float32)
    for i_t in range(first, last, BT):
        o_i = i_t + tl.arange(0, BT)
        o_t, m_t = o_i.to(tl.int64), o_i < last
        b_g = tl.load(grad_y + o_t[:, None] * stride_y + AT + o_n[None, :], mask=m_t[:, None] & m_n[None, :], other=0.0)
        b_acc = add_gradient(b_acc, b_g, low, o_t, m_t, R, BR, RANKS, UPCAST)
    p_out = out + o_n[:, None] * R + o_r[None, :]
    tl.store(p_out, (b_acc * scale).to(out.dtype.element_ty), mask=m_n[:, None] & (o_r < R)[None, :])


@triton.jit
def store_gradient_of_a(b_acc, out, o_k, K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, C: tl.constexpr):
    o_r = tl.arange(0, BR)
    p_out = out + o_r[None, :] * K + o_k[:, None]
    tl.store(p_out, (b_acc * C).to(out.dtype.element_ty), mask=(o_k < K)[:, None] & (o_r < R)[None, :])
