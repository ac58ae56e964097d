"""The Triton kernels of the contrasts; ``contrast`` launches them and says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

LOW = tl.constexpr(-1e30)  # the logit of a key that takes no part: finite, so that 0 times it is 0


@triton.jit
def _tile(x, rows, columns, width, stride_n, stride_d, EVEN: tl.constexpr):
    # Callers repeat the last row instead of masking rows, and EVEN says that no column needs a mask: masks
    # and their addresses are what the largest tiles have no registers for.
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    if EVEN:
        return tl.load(x + offsets)
    return tl.load(x + offsets, mask=(columns < width)[None, :], other=0.0)


@triton.jit
def _squares(tile, ACC: tl.constexpr):
    wide = tile.to(ACC)
    return tl.sum(wide * wide, 1)


@triton.jit
def _scale(log_scale, MIN: tl.constexpr, MAX: tl.constexpr, ACC: tl.constexpr):
    raw = tl.exp(tl.load(log_scale).to(ACC))
    low, high = tl.full((), MIN, ACC), tl.full((), MAX, ACC)
    return tl.minimum(tl.maximum(raw, low), high), (raw >= low) & (raw <= high)


@triton.jit
def _disagree(query, key, negative, DOT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    # Subtracted outside of the product: tensor cores truncate what they accumulate, and over a whole row that
    # bias is more than PyTorch's own error in the slope of the scale. Triton would take a sum back inside.
    key = tl.trans(key.to(DOT))
    return negative - tl.dot(query.to(DOT), key, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _gather(weights, key, inverse, total, DOT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    # The keys' inverse lengths go into the weights, and the tile raw into the product; float16 cannot
    # hold the inverse length of a short key, so there the tile is divided instead.
    if DOT == tl.float16:  # noqa: SIM300
        key = key.to(ACC) * inverse[:, None]
    else:
        weights = weights * inverse[None, :]
    return tl.dot(weights.to(DOT), key.to(DOT), total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def contrast_lengths_kernel(
    x, inverse, rows, width, stride_n, stride_d,
    EPS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.minimum(row, rows - 1)
    total = tl.zeros((ROWS,), ACC)
    for first in range(0, width, CHUNK):
        total += _squares(
            _tile(x, source, first + tl.arange(0, CHUNK), width, stride_n, stride_d, False), ACC
        )
    tl.store(inverse + row, 1.0 / (tl.sqrt(total) + EPS), mask=row < rows)


@triton.jit
def contrast_rows_kernel(
    queries, keys, log_scale, query_labels, key_labels, self_index, key_inverse,
    peak, total, moment, agreement, count, weighted, ticket,
    rows, key_rows, width, batch, key_batch, key_offset, keys_per_split, splits,
    stride_qn, stride_qd, stride_kn, stride_kd,
    EPS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, LABELLED: tl.constexpr, PASS: tl.constexpr,
    HELD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    SLICE: tl.constexpr, SLICES: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # A block of queries against a share of the keys; the third axis takes the columns in groups of SLICES
    # slices. peak, total, agreement, count (splits, rows); weighted (splits, rows, width).
    # PASS 0: log-sum-exp and the positives' logits. 1: log-sum-exp and the keys weighted by exp(logit -
    # peak). 2: after 0, the keys weighted by the final probability minus the positives' share.
    split, group = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    source = tl.minimum(row, rows - 1)
    if PASS != 2 and tl.program_id(0) + split + group == 0:
        tl.store(ticket, 0)
    inner = tl.arange(0, CHUNK)
    outer = group * SLICES * SLICE + tl.arange(0, SLICE)
    squares = tl.zeros((BLOCK_M,), ACC)
    for first in range(0, width, CHUNK):
        squares += _squares(_tile(queries, source, first + inner, width, stride_qn, stride_qd, EVEN), ACC)
    scale, _ = _scale(log_scale, MIN, MAX, ACC)
    factor = scale / (tl.sqrt(squares) + EPS)
    if LABELLED:
        label = tl.load(query_labels + row, mask=inside, other=0)
        itself = tl.full((BLOCK_M,), -1, tl.int64)
        if self_index is not None:
            itself = tl.load(self_index + row, mask=inside, other=-1)
    else:
        itself = row // batch * key_batch + key_offset + row % batch
    top = tl.full((BLOCK_M,), LOW, ACC)
    mass = tl.zeros((BLOCK_M,), ACC)
    first_moment = tl.zeros((BLOCK_M,), ACC)
    agreed = tl.zeros((BLOCK_M,), ACC)
    found = tl.zeros((BLOCK_M,), ACC)
    if PASS == 2:
        at = row.to(tl.int64)
        for _ in range(splits):
            high = tl.load(peak + at, mask=inside, other=LOW)
            new = tl.maximum(top, high)
            base = tl.where(new == LOW, 0.0, new)
            mass = mass * tl.exp(top - base)
            mass += tl.load(total + at, mask=inside, other=0.0) * tl.exp(high - base)
            found += tl.load(count + at, mask=inside, other=0.0)
            top = new
            at += rows
        final = top + tl.log(tl.where(mass > 0.0, mass, 1.0))
        share = tl.where(found > 0.0, 1.0 / tl.maximum(found, 1.0), 0.0)
    if HELD:
        query0 = _tile(queries, source, outer, width, stride_qn, stride_qd, EVEN).to(DOT)
        if SLICES > 1:
            query1 = _tile(queries, source, outer + SLICE, width, stride_qn, stride_qd, EVEN).to(DOT)
        if SLICES > 2:
            query2 = _tile(queries, source, outer + 2 * SLICE, width, stride_qn, stride_qd, EVEN).to(DOT)
    if PASS > 0:
        sum0 = tl.zeros((BLOCK_M, SLICE), ACC)
        if SLICES > 1:
            sum1 = tl.zeros((BLOCK_M, SLICE), ACC)
        if SLICES > 2:
            sum2 = tl.zeros((BLOCK_M, SLICE), ACC)
    last = tl.minimum((split + 1) * keys_per_split, key_rows)
    for first_key in range(split * keys_per_split, last, BLOCK_N):
        column = first_key + tl.arange(0, BLOCK_N)
        origin = column
        if not WHOLE:
            origin = tl.minimum(column, key_rows - 1)
        lengths = tl.zeros((BLOCK_N,), ACC)
        negative = tl.zeros((BLOCK_M, BLOCK_N), ACC)  # of the products of queries and keys
        if HELD:
            key0 = _tile(keys, origin, outer, width, stride_kn, stride_kd, EVEN)
            negative = _disagree(query0, key0, negative, DOT, PRECISION, ACC)
            if SLICES > 1:
                key1 = _tile(keys, origin, outer + SLICE, width, stride_kn, stride_kd, EVEN)
                negative = _disagree(query1, key1, negative, DOT, PRECISION, ACC)
            if SLICES > 2:
                key2 = _tile(keys, origin, outer + 2 * SLICE, width, stride_kn, stride_kd, EVEN)
                negative = _disagree(query2, key2, negative, DOT, PRECISION, ACC)
            if key_inverse is None:
                lengths = _squares(key0, ACC)
                if SLICES > 1:
                    lengths += _squares(key1, ACC)
                if SLICES > 2:
                    lengths += _squares(key2, ACC)
        else:
            for first in range(0, width, CHUNK):
                query = _tile(queries, source, first + inner, width, stride_qn, stride_qd, EVEN)
                key = _tile(keys, origin, first + inner, width, stride_kn, stride_kd, EVEN)
                negative = _disagree(query, key, negative, DOT, PRECISION, ACC)
                if key_inverse is None:
                    lengths += _squares(key, ACC)
        if key_inverse is None:  # noqa: SIM108
            inverse = 1.0 / (tl.sqrt(lengths) + EPS)
        else:
            inverse = tl.load(key_inverse + origin)
        logits = negative * -factor[:, None] * inverse[None, :]
        taken = column[None, :] != itself[:, None]
        if not WHOLE:
            taken = taken & (column < last)[None, :]
        if LABELLED:
            key_label = tl.load(key_labels + origin)
            positive = taken & (label[:, None] == key_label[None, :])
        if PASS == 2:
            weights = tl.where(taken, tl.exp(logits - final[:, None]), 0.0)
            weights = tl.where(found[:, None] > 0.0, weights - tl.where(positive, share[:, None], 0.0), 0.0)
        else:
            if LABELLED:
                agreed += tl.sum(tl.where(positive, logits, 0.0), 1)
                found += tl.sum(positive.to(ACC), 1)
            logits = tl.where(taken, logits, LOW)
            new = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(new == LOW, 0.0, new)  # a row may have met none but itself so far
            shrink = tl.exp(top - base)
            weights = tl.exp(logits - base[:, None])
            mass = mass * shrink + tl.sum(weights, 1)
            # The scale's slope needs the mean logit in full precision, which the weighted keys lack.
            first_moment = first_moment * shrink + tl.sum(weights * logits, 1)
            top = new
            if PASS == 1:
                sum0 *= shrink[:, None]
                if SLICES > 1:
                    sum1 *= shrink[:, None]
                if SLICES > 2:
                    sum2 *= shrink[:, None]
        if PASS > 0:
            if not HELD:
                key0 = _tile(keys, origin, outer, width, stride_kn, stride_kd, EVEN)
            sum0 = _gather(weights, key0, inverse, sum0, DOT, PRECISION, ACC)
            if SLICES > 1:
                if not HELD:
                    key1 = _tile(keys, origin, outer + SLICE, width, stride_kn, stride_kd, EVEN)
                sum1 = _gather(weights, key1, inverse, sum1, DOT, PRECISION, ACC)
            if SLICES > 2:
                if not HELD:
                    key2 = _tile(keys, origin, outer + 2 * SLICE, width, stride_kn, stride_kd, EVEN)
                sum2 = _gather(weights, key2, inverse, sum2, DOT, PRECISION, ACC)
    at = split.to(tl.int64) * rows + row
    if PASS != 2:
        once = inside & (group == 0)
        tl.store(peak + at, top, mask=once)
        tl.store(total + at, mass, mask=once)
        tl.store(moment + at, first_moment, mask=once)
        if LABELLED:
            tl.store(agreement + at, agreed, mask=once)
            tl.store(count + at, found, mask=once)
    if PASS > 0:
        out = weighted + at[:, None] * width + outer[None, :]
        tl.store(out, sum0, mask=inside[:, None] & (outer < width)[None, :])
        if SLICES > 1:
            tl.store(out + SLICE, sum1, mask=inside[:, None] & (outer + SLICE < width)[None, :])
        if SLICES > 2:
            tl.store(out + 2 * SLICE, sum2, mask=inside[:, None] & (outer + 2 * SLICE < width)[None, :])


@triton.jit
def contrast_finish_kernel(
    queries, keys, log_scale, peak, total, moment, agreement, count, weighted, slope, partial, ticket,
    loss, stats, rows, width, batch, key_batch, key_offset, splits,
    stride_qn, stride_qd, stride_kn, stride_kd,
    EPS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, IDENTITY: tl.constexpr,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # Adds the splits in order and makes a row's loss and slope. partial (3, programs): sums of loss, of the
    # scale's slope and of rows that count; the program that arrives last adds them in order. The ticket
    # counts in integers, so which program comes last changes nothing.
    program, programs = tl.program_id(0), tl.num_programs(0)
    row, columns = program * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = row < rows
    source = tl.minimum(row, rows - 1)
    scale, free = _scale(log_scale, MIN, MAX, ACC)
    query = _tile(queries, source, columns, width, stride_qn, stride_qd, False).to(ACC)
    length = tl.sqrt(tl.sum(query * query, 1))
    top = tl.full((ROWS,), LOW, ACC)
    at = row.to(tl.int64)
    for _ in range(splits):
        top = tl.maximum(top, tl.load(peak + at, mask=inside, other=0.0))
        at += rows
    base = tl.where(top == LOW, 0.0, top)
    mass = tl.zeros((ROWS,), ACC)
    mean = tl.zeros((ROWS,), ACC)
    at = row.to(tl.int64)
    for _ in range(splits):
        high = tl.load(peak + at, mask=inside, other=0.0)
        share = tl.exp(high - base)
        mass += tl.load(total + at, mask=inside, other=0.0) * share
        mean += tl.load(moment + at, mask=inside, other=0.0) * share
        at += rows
    mass = tl.where(mass > 0.0, mass, 1.0)
    mean /= mass
    difference = tl.zeros((ROWS, BLOCK_D), ACC)
    if IDENTITY == 2:
        agreed = tl.zeros((ROWS,), ACC)
        found = tl.zeros((ROWS,), ACC)
        at = row.to(tl.int64)
        for _ in range(splits):
            agreed += tl.load(agreement + at, mask=inside, other=0.0)
            found += tl.load(count + at, mask=inside, other=0.0)
            at += rows
        valid = inside & (found > 0.0)
        agreed /= tl.maximum(found, 1.0)
    else:
        valid = inside
        block, sample = source // batch, source % batch
        cosine = tl.zeros((ROWS,), ACC)
        for step in tl.static_range(1, 4):
            other = (block + step) % 4
            if IDENTITY == 0:  # noqa: SIM108
                alike = block % 2 == other % 2
            else:
                alike = (block + 1) // 2 % 2 == (other + 1) // 2 % 2
            index = tl.where(alike, sample, batch - 1 - sample)
            key_row = other * key_batch + key_offset + index
            key = _tile(keys, key_row, columns, width, stride_kn, stride_kd, False).to(ACC)
            key *= (1.0 / (tl.sqrt(tl.sum(key * key, 1)) + EPS))[:, None]
            cosine += tl.sum(query * key, 1)
            difference -= key
        difference /= 3.0
        agreed = scale * cosine / (3.0 * (length + EPS))
    row_loss = tl.where(valid, top + tl.log(mass) - agreed, 0.0)
    row_slope = tl.where(valid, mean - agreed, 0.0)
    if GRADIENT:
        stored = inside[:, None] & (columns < width)[None, :]
        at = row.to(tl.int64)
        for _ in range(splits):
            part = tl.load(weighted + at[:, None] * width + columns[None, :], mask=stored, other=0.0)
            if IDENTITY != 2:
                high = tl.load(peak + at, mask=inside, other=0.0)
                part *= (tl.exp(high - base) / mass)[:, None]
            difference += part
            at += rows
        difference *= scale
        unit = query / (length + EPS)[:, None]
        # Through q / (|q| + eps); at zero PyTorch takes 0 for the slope of the length.
        along = tl.sum(unit * difference, 1) / tl.where(length > 0.0, length, 1.0)
        result = difference / (length + EPS)[:, None] - unit * along[:, None]
        tl.store(slope + row.to(tl.int64)[:, None] * width + columns[None, :], result, mask=stored)
    tl.store(partial + program, tl.sum(row_loss, 0))
    tl.store(partial + programs + program, tl.sum(row_slope, 0))
    tl.store(partial + 2 * programs + program, tl.sum(valid.to(ACC), 0))
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel")
    if arrived == programs - 1:
        all_loss = tl.zeros((BLOCK_P,), ACC)
        all_slope = tl.zeros((BLOCK_P,), ACC)
        all_valid = tl.zeros((BLOCK_P,), ACC)
        for first in range(0, programs, BLOCK_P):
            slot = first + tl.arange(0, BLOCK_P)
            known = slot < programs
            at_slot = partial + slot
            all_loss += tl.load(at_slot, mask=known, other=0.0, cache_modifier=".cg")
            all_slope += tl.load(at_slot + programs, mask=known, other=0.0, cache_modifier=".cg")
            all_valid += tl.load(at_slot + 2 * programs, mask=known, other=0.0, cache_modifier=".cg")
        inverse = 1.0 / tl.maximum(tl.sum(all_valid, 0), 1.0)
        tl.store(loss, tl.sum(all_loss, 0) * inverse)
        tl.store(stats, tl.where(free, tl.sum(all_slope, 0) * inverse, 0.0))
        tl.store(stats + 1, inverse)


@triton.jit
def contrast_backward_kernel(
    grad, slope, stats, grad_queries, grad_scale, elements, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    incoming = tl.load(grad)
    factor = incoming * tl.load(stats + 1)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(slope + at, mask=at < elements, other=0.0) * factor
    tl.store(grad_queries + at, value.to(grad_queries.dtype.element_ty), mask=at < elements)
    if program == 0:
        tl.store(grad_scale, (incoming * tl.load(stats)).to(grad_scale.dtype.element_ty))
