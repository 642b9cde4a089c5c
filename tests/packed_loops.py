"""SLA and VSA over a packed sequence, computed with plain loops in float64: what the tests compare everything with.

It shares no code with the package but `VideoGrid` and `TokenLayout` as values. Blocks and tiles are lists of token
numbers here, in the order of the sequence, and no list ever holds tokens of two segments.
"""

import math

import torch


def segments(layout):
    """Token numbers of each protected segment before the video, of the video, and of each segment after it."""
    start, parts = 0, []
    for length in (*layout.before, layout.grid.num_tokens, *layout.after):
        parts.append(list(range(start, start + length)))
        start += length
    return parts[: len(layout.before)], parts[len(layout.before)], parts[len(layout.before) + 1 :]


def cubes_of(layout, tile):
    """Token numbers of each cube of the video, cubes and tokens in (t, h, w) order."""
    _, video, _ = segments(layout)
    _, height, width = layout.grid.shape
    corners = [range(0, side, edge) for side, edge in zip(layout.grid.shape, tile, strict=True)]
    cubes = []
    for corner in ((t, h, w) for t in corners[0] for h in corners[1] for w in corners[2]):
        ranges = [range(c, min(c + edge, side)) for c, edge, side in zip(corner, tile, layout.grid.shape, strict=True)]
        cubes.append([video[(t * height + h) * width + w] for t in ranges[0] for h in ranges[1] for w in ranges[2]])
    return cubes


def cut(tokens, size):
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def softmax_over(query, key, value, rows, columns, scale):
    """[rows, D] of one head: attention of the tokens `rows` to the tokens `columns`."""
    return torch.softmax(query[rows] @ key[columns].T * scale, -1) @ value[columns]


def place(parts, length):
    """Rows by token number, {tokens: [n, D]}, to [length, D]."""
    tokens = [token for rows, _ in parts for token in rows]
    assert sorted(tokens) == list(range(length))
    return torch.cat([output for _, output in parts])[torch.tensor(tokens).argsort()]


def sla_loops(query, key, value, layout, config, tile=None, weight=None, bias=None, lengths=None, picked=None):
    """SLA with the feature map "elu", [B, H, L, D].

    Args:
        tile: the cube that the video's tokens are sorted by; None for raster order.
        lengths: valid keys of each sample; None for all.
        picked: a list to add to: for each sample, head, and row, the critical and the marginal blocks of the video.
    """
    before, video, after = segments(layout)
    if tile is not None:
        video = [token for cube in cubes_of(layout, tile) for token in cube]
    rows, columns = cut(video, config.block_q), cut(video, config.block_k)
    protected = [token for segment in before + after for token in segment]
    scale, length = query.shape[-1] ** -0.5, layout.num_tokens
    critical_count = max(1, math.floor(config.keep_ratio * len(columns) + 1e-6)) if config.keep_ratio else 0
    dropped_count = min(math.floor(config.drop_ratio * len(columns) + 1e-6), len(columns) - critical_count)
    samples = []
    for b in range(query.shape[0]):
        valid = length if lengths is None else int(lengths[b])
        text = [token for token in protected if token < valid]
        heads = []
        for h in range(query.shape[1]):
            q, k, v = (x[b, h] for x in (query, key, value))
            phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
            parts = [(protected, softmax_over(q, k, v, protected, text + sorted(video), scale))]
            for row in rows:
                scores = [(q[row].mean(0) @ k[column].mean(0)).item() for column in columns]
                order = sorted(range(len(columns)), key=lambda j, scores=scores: (-scores[j], j))
                critical = order[:critical_count]
                marginal = order[critical_count : len(order) - dropped_count]
                if picked is not None:
                    picked.append((sorted(critical), sorted(marginal)))
                summed = {
                    "marginal": [token for j in marginal for token in columns[j]],
                    "noncritical": [token for j in order[critical_count:] for token in columns[j]],
                    "all": video + text,
                    "none": [],
                }[config.linear_scope]
                read = [token for j in critical for token in columns[j]] + text
                output = softmax_over(q, k, v, row, read, scale)
                if summed:
                    weights = phi_q[row] @ phi_k[summed].T
                    linear = weights @ v[summed] / (weights.sum(1, keepdim=True) + 1e-5)
                else:
                    linear = torch.zeros_like(output)
                if config.linear_scope != "none":
                    output = output + (linear if weight is None else linear @ weight.T + bias)
                parts.append((row, output))
            heads.append(place(parts, length))
        samples.append(torch.stack(heads))
    return torch.stack(samples)


def vsa_loops(query, key, value, layout, tile, kept, gate_coarse=None, gate_fine=None, picked=None):
    """VSA, [B, H, L, D].

    Args:
        kept: how many cubes of the video each cube reads.
        picked: a list to add to: for each sample, head, and cube, the cubes that it reads.
    """
    before, _, after = segments(layout)
    size = math.prod(tile)
    cubes = cubes_of(layout, tile)
    chunks = [chunk for segment in before + after for chunk in cut(segment, size)]
    text = [token for chunk in chunks for token in chunk]
    scale, length = query.shape[-1] ** -0.5, layout.num_tokens
    samples = []
    for b in range(query.shape[0]):
        heads = []
        for h in range(query.shape[1]):
            q, k, v = (x[b, h] for x in (query, key, value))
            pooled_key, pooled_value = (torch.stack([x[tile].mean(0) for tile in cubes + chunks]) for x in (k, v))
            parts = []
            for number, tokens in enumerate(cubes + chunks):
                scores = pooled_key @ q[tokens].mean(0) * scale
                coarse = (torch.softmax(scores, 0) @ pooled_value).expand(len(tokens), -1)
                read = list(range(length))
                if number < len(cubes):
                    values = scores.tolist()
                    best = sorted(range(len(cubes)), key=lambda j, values=values: (-values[j], j))[:kept]
                    if picked is not None:
                        picked.append(sorted(best))
                    read = [token for j in best for token in cubes[j]] + text
                fine = softmax_over(q, k, v, tokens, read, scale)
                if gate_coarse is not None:
                    coarse = coarse * gate_coarse[b, h][tokens]
                if gate_fine is not None:
                    fine = fine * gate_fine[b, h][tokens]
                parts.append((tokens, coarse + fine))
            heads.append(place(parts, length))
        samples.append(torch.stack(heads))
    return torch.stack(samples)
