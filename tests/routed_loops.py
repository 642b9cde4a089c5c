"""SLA2 over a packed sequence, computed with plain loops in float64: what the tests compare everything with.

It shares no code with the package, and cuts tokens as `packed_loops` does.
"""

import math

import torch
from packed_loops import cubes_of, cut, place, segments, softmax_over


def soft_top_k(scores, kept, temperature):
    """[C] to [C]: sigmoid(score / temperature + shift) with the shift for which they sum to `kept`, differentiable."""
    scaled = scores / temperature
    low, high = -1e4, 1e4
    for _ in range(200):
        shift = (low + high) / 2
        low, high = (shift, high) if torch.sigmoid(scaled + shift).sum() < kept else (low, shift)
    with torch.no_grad():
        slope = torch.sigmoid(scaled + shift) * (1 - torch.sigmoid(scaled + shift))
    # By the implicit function theorem: the shift moves against the mean of the scores, weighted by their slopes.
    moved = shift - ((scaled - scaled.detach()) * slope / slope.sum()).sum()
    return torch.sigmoid(scaled + moved)


def routed_loops(
    query, key, value, alpha_logits, proj_query, proj_key, *, layout, config, tile=None, lengths=None, picked=None
):
    """[B, H, L, D], with the feature map "elu".

    Args:
        tile: the cube that the video's tokens are sorted by; None for raster order.
        lengths: valid keys of each sample; None for all.
        picked: a list to add to: for each sample, head, and row, the critical blocks of the video.
    """
    before, video, after = segments(layout)
    if tile is not None:
        video = [token for cube in cubes_of(layout, tile) for token in cube]
    rows, columns = cut(video, config.block_q), cut(video, config.block_k)
    protected = [token for segment in before + after for token in segment]
    scale, length = query.shape[-1] ** -0.5, layout.num_tokens
    kept = max(1, math.floor(config.keep_ratio * len(columns) + 1e-6))
    samples = []
    for b in range(query.shape[0]):
        valid = length if lengths is None else int(lengths[b])
        text = [token for token in protected if token < valid]
        heads = []
        for h in range(query.shape[1]):
            q, k, v = (x[b, h] for x in (query, key, value))
            parts = [(protected, softmax_over(q, k, v, protected, text + sorted(video), scale))]
            for i, row in enumerate(rows):
                mean_query, mean_keys = q[row].mean(0).detach(), [k[column].mean(0).detach() for column in columns]
                scores = torch.stack([(proj_query @ mean_query) @ (proj_key @ mean) * scale for mean in mean_keys])
                order = sorted(range(len(columns)), key=lambda j, scores=scores: (-scores[j].item(), j))
                critical, others = order[:kept], order[kept:]
                if picked is not None:
                    picked.append(sorted(critical))
                alpha = torch.sigmoid(alpha_logits[h, i * alpha_logits.shape[1] // len(rows)])
                if config.routing == "soft":
                    soft = soft_top_k(scores, kept, config.temperature)
                    parts.append((row, soft_output(q, k, v, row, columns, soft, text, alpha, scale)))
                    continue
                output = row_output(q, k, v, row, columns, critical, others, text, alpha, scale)
                if others:
                    soft = soft_top_k(scores, kept, config.temperature)
                    for j in range(len(columns)):
                        with torch.no_grad():
                            change = change_by(q, k, v, row, columns, critical, others, text, alpha, scale, j)
                        output = output + (soft[j] - soft[j].detach()) * change
                parts.append((row, output))
            heads.append(place(parts, length))
        samples.append(torch.stack(heads))
    return torch.stack(samples)


def phi(x):
    return torch.nn.functional.elu(x) + 1


def linear_parts(q, k, v, row, tokens):
    """Numerator [rows, D] and denominator [rows, 1] of linear attention, token by token."""
    weights = phi(q[row]) @ phi(k[tokens]).T
    return weights @ v[tokens], weights.sum(1, keepdim=True)


def row_output(q, k, v, row, columns, critical, others, text, alpha, scale):
    exact = softmax_over(q, k, v, row, [token for j in critical for token in columns[j]] + text, scale)
    if not others:
        return exact
    above, below = linear_parts(q, k, v, row, [token for j in others for token in columns[j]])
    return alpha * exact + (1 - alpha) * above / (below + 1e-5)


def soft_output(q, k, v, row, columns, soft, text, alpha, scale):
    """[rows, D]: block j counts exactly by soft[j], and linearly by the rest; text only exactly."""
    exact, total = torch.exp(q[row] @ k[text].T * scale) @ v[text], torch.exp(q[row] @ k[text].T * scale).sum(1)
    above, below = torch.zeros_like(exact), torch.zeros_like(total)[:, None]
    for j, column in enumerate(columns):
        weights = soft[j] * torch.exp(q[row] @ k[column].T * scale)
        exact, total = exact + weights @ v[column], total + weights.sum(1)
        part, weight = linear_parts(q, k, v, row, column)
        above, below = above + (1 - soft[j]) * part, below + (1 - soft[j]) * weight
    return alpha * exact / total[:, None] + (1 - alpha) * above / (below + 1e-5)


def change_by(q, k, v, row, columns, critical, others, text, alpha, scale, j):
    """[rows, D]: what these rows gain if block j is read exactly, by its means, and lose of the linear branch."""
    read = [token for i in critical for token in columns[i]] + text
    scores = q[row] @ k[read].T * scale
    exact = torch.softmax(scores, 1) @ v[read]
    by_mean = torch.exp(q[row] @ k[columns[j]].mean(0) * scale) * len(columns[j])
    total = torch.exp(scores).sum(1)
    share = (by_mean / total).clamp(max=1) if j in critical else by_mean / (total + by_mean)
    above, below = linear_parts(q, k, v, row, [token for i in others for token in columns[i]])
    part, weight = linear_parts(q, k, v, row, columns[j])
    lost = (part - weight * above / (below + 1e-5)) / (below + 1e-5)
    return alpha * share[:, None] * (v[columns[j]].mean(0) - exact) - (1 - alpha) * lost
