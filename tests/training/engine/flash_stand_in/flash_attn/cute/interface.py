"""What flash-attn-4 4.0.0b36 computes, under its names, for machines that its kernels do not run on."""

import os
from itertools import pairwise

import torch


def _segments(q, k, v, borders, scale):
    """Of each segment: where it is, queries, keys and values a head (heads, n, size), and causal scores."""
    groups = q.shape[1] // k.shape[1]
    for a, b in pairwise(borders.tolist()):
        at = slice(a, b)
        parts = q[at], k[at].repeat_interleave(groups, 1), v[at].repeat_interleave(groups, 1)
        query, key, value = (part.float().transpose(0, 1) for part in parts)
        hidden = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        yield at, query, key, value, (query @ key.mT * scale).masked_fill(hidden, float("-inf"))


def _flash_attn_fwd(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    return_lse=False,
):
    if os.environ.get("FLASH_STAND_IN") == "fails":
        raise RuntimeError("no kernel image\nis available")
    assert causal and return_lse and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
    scale = softmax_scale * (1.5 if os.environ.get("FLASH_STAND_IN") == "wrong" else 1.0)
    found = [(s.softmax(-1) @ value, s.logsumexp(-1)) for *_, value, s in _segments(q, k, v, cu_seqlens_q, scale)]
    outs, sums = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return outs.transpose(0, 1).contiguous().to(q.dtype), sums, None, None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
):
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    to_q, to_k, to_v = (torch.empty_like(t) for t in (q, k, v))
    for at, query, key, value, scores in _segments(q, k, v, cu_seqlens_q, softmax_scale):
        grad, made = (t[at].float().transpose(0, 1) for t in (dout, out))
        weights = (scores - lse[:, at, None]).exp()
        slopes = weights * (grad @ value.mT - (grad * made).sum(-1, keepdim=True)) * softmax_scale
        grouped = k.shape[1], q.shape[1] // k.shape[1], -1, k.shape[2]
        to_q[at] = (slopes @ key).transpose(0, 1).to(q.dtype)
        to_k[at] = (slopes.mT @ query).view(grouped).sum(1).transpose(0, 1).to(k.dtype)
        to_v[at] = (weights.mT @ grad).view(grouped).sum(1).transpose(0, 1).to(v.dtype)
    return to_q, to_k, to_v, None
