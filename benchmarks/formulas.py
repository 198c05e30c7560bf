"""What an edit costs, on paper: memory, passes through blocks and bytes on disk, method by method.

Symbols: L blocks, D residual width, F key width, V words, T tokens of a prompt with its answer, s of them from the
subject's last on, m tokens of the answer, c tokens of a context, Q contexts, S steps, N edits.
"""

from __future__ import annotations

import math

from benchmarks.cost import DOUBLE, SINGLE, Cost, Shape, Text

ENCODER = 90_900_000  # bytes of MiniLM
VECTOR = 384  # its width


# ---------------------------------------------------------------------------- locate, then edit


def value_search(
    shape: Shape, text: Text, layer: int, steps: int, contexts: int, edits: int, parallel: int = 8
) -> Cost:
    """Of N edits: rows in Q contexts and one of the essence; tokens before the subject's last run once."""
    rows = edits * (contexts + 1)
    before, above = text.whole + text.context - text.after, shape.layers - layer
    stored = rows * (before * shape.layers * shape.cached + text.after * shape.width * shape.bytes)
    heads = edits * (contexts * text.answer + 1)
    return Cost(
        forward=rows * (before * shape.layers + text.after * layer),
        trained=steps * rows * text.after * above,
        passes=math.ceil(edits / parallel) * (shape.layers + layer + 2 * steps * above),
        heads=steps * heads,
        peak=stored
        + rows * above * (text.after * shape.saved + before * shape.looked_back)
        + heads * shape.distribution,
    )


def written(shape: Shape, matrices: int) -> float:
    """Bytes while MLP matrices are written: updates and sums in double precision, and the new weights."""
    return shape.matrix * (2 * DOUBLE + matrices * shape.bytes)


def rome(shape: Shape, text: Text, layer: int, steps: int = 20, contexts: int = 21) -> Cost:
    search = value_search(shape, text, layer, steps, contexts, 1)
    factors = DOUBLE * (shape.inner + shape.width)
    return Cost(
        held=DOUBLE * shape.inner**2,
        forward=search.forward,
        trained=search.trained,
        passes=search.passes,
        heads=search.heads,
        operations=2 * shape.inner**2 + 6 * shape.matrix,
        peak=max(search.peak, written(shape, 1)),
        kept=shape.bytes * shape.matrix + factors,
        disk=factors,
    )


def memit(
    shape: Shape,
    text: Text,
    layers: list[int],
    edits: int,
    steps: int = 25,
    contexts: int = 6,
    parallel: int = 8,
    keeps_keys: bool = False,
) -> Cost:
    """MEMIT, and AlphaEdit and MEMIT-seq, which keep the keys."""
    search = value_search(shape, text, layers[-1], steps, contexts, edits, parallel)
    part = value_search(shape, text, layers[-1], steps, contexts, min(parallel, edits))
    subject = text.whole - text.after + 1
    reads = sum(contexts * (subject + text.context) * n + subject * layers[-1] for n in layers)
    smaller = min(edits * (shape.inner + shape.width), shape.matrix)
    update = DOUBLE * len(layers) * smaller
    update += SINGLE * len(layers) * shape.inner * edits if keeps_keys else 0
    solve = len(layers) * (2 * shape.inner**2 * edits + 2 * shape.inner * edits**2)
    return Cost(
        held=DOUBLE * len(layers) * shape.inner**2,
        forward=search.forward + edits * (reads + subject * layers[-1]),
        trained=search.trained,
        passes=search.passes
        + sum(layers) * (contexts if edits > 1 else 1)
        + len(layers) * layers[-1],
        heads=search.heads,
        operations=solve,
        peak=max(part.peak, written(shape, len(layers))) + update,
        kept=len(layers) * shape.bytes * shape.matrix + update,
        disk=update,
    )


def moments(shape: Shape, text: Text, layers: list[int]) -> Cost:
    """Second moments of some blocks' keys, for one token of text."""
    return Cost(
        held=2 * DOUBLE * len(layers) * shape.inner**2,
        forward=max(layers) + 1,
        operations=len(layers) * shape.inner**2,
        disk=2 * DOUBLE * len(layers) * shape.inner**2,
    )


def neurons(
    shape: Shape, text: Text, points: int = 20, contexts: int = 6, batch: int = 128, found: int = 5
) -> Cost:
    """KN: for every block one row per context and point, from that block up, at the answer's positions."""
    rows = contexts * points
    trained = rows * text.answer * shape.layers * (shape.layers + 1) / 2
    together, before = min(rows, batch), text.whole + text.context - text.answer
    row = text.answer * shape.saved + before * (shape.looked_back + shape.cached)
    factors = DOUBLE * found * (shape.inner + shape.width)
    return Cost(
        forward=contexts * 2 * (text.whole + text.context) * shape.layers,
        trained=trained,
        passes=math.ceil(rows / batch) * shape.layers * (shape.layers + 1) + 2 * shape.layers,
        heads=rows * text.answer * shape.layers,
        peak=together * (shape.layers * row + text.answer * shape.distribution),
        kept=min(found, shape.layers) * shape.bytes * shape.matrix + factors,
        disk=factors,
    )


# ---------------------------------------------------------------------------- fine-tuning


def fine_tuned(shape: Shape, text: Text, layer: int, steps: int = 25) -> Cost:
    """FT of one block's output projection: the update, its gradient and Adam's two moments."""
    update = SINGLE * shape.matrix
    above = shape.layers - layer
    search = text.whole * above * shape.saved + text.answer * shape.distribution
    return Cost(
        forward=text.whole * layer,
        trained=steps * text.whole * above,
        passes=layer + 2 * steps * above,
        heads=steps * text.answer,
        operations=steps * (6 * text.whole + 12) * shape.matrix,
        peak=max(5 * update + search, update + written(shape, 1)),
        kept=shape.bytes * shape.matrix + update,
        disk=update,
    )


def lora(
    shape: Shape,
    text: Text,
    layers: int,
    targets: list[tuple[int, int]],
    rank: int = 8,
    steps: int = 40,
) -> Cost:
    """LoRA on some matrices (inputs, outputs) of the highest so many blocks."""
    factors = SINGLE * rank * layers * sum(i + o for i, o in targets)
    weights = layers * sum(i * o for i, o in targets)
    side = layers * sum(2 * SINGLE * (i + rank) for i, _ in targets)
    search = text.whole * (layers * shape.saved + side) + text.answer * shape.distribution
    return Cost(
        forward=text.whole * (shape.layers - layers),
        trained=steps * text.whole * layers,
        passes=shape.layers - layers + 2 * steps * layers,
        heads=steps * text.answer,
        operations=steps * text.whole * 6 * factors / SINGLE,
        peak=max(
            5 * factors + search,
            2 * DOUBLE * max(i * o for i, o in targets) + shape.bytes * weights,
        ),
        kept=shape.bytes * weights + factors,
        disk=factors,
    )


# ---------------------------------------------------------------------------- learned editors


def pair_network(shapes: list[tuple[int, int]], rank: int) -> int:
    """Parameters of MEND's or MALMEN's networks: one for each shape, with a scale and offset for each matrix."""
    total = 0
    for i, o in dict.fromkeys(shapes):
        width, count = i + o, shapes.count((i, o))
        total += 2 * (2 * min(rank, width) * width + width + 2 * count * width)
    return total


def heads_of_ke(shapes: list[tuple[int, int]], width: int, hidden: int, condition: int) -> int:
    """Parameters of KE: a two-way LSTM, a summary, and a head for each matrix, with weight norms."""
    lstm = 2 * 4 * hidden * (width + hidden + 2)
    summary = (2 * hidden + 1) * condition
    outputs = [2 * (i + o) + 1 for i, o in shapes]
    heads = sum((condition + 2) * hidden + (hidden + 2) * n for n in outputs)
    return lstm + summary + heads


def gradients(shape: Shape, text: Text, layers: int) -> Cost:
    """One pass of an edit forward and back through the highest so many blocks."""
    return Cost(
        forward=text.whole * (shape.layers - layers),
        trained=text.whole * layers,
        passes=shape.layers + layers,
        heads=text.answer,
        peak=text.whole * layers * shape.saved + text.answer * shape.distribution,
    )


def learned(
    shape: Shape, text: Text, layers: int, parameters: int, matrices: list[tuple[int, int]],
    ranks: float, each: float, held: float = 0,
) -> Cost:  # fmt: skip
    """An edit of a trained editor: a pass, the network on every token's pair, an update of low rank.

    Args:
        shape: the model's.
        text: the edit's.
        layers: edited blocks, the highest.
        parameters: of the editor.
        matrices: (inputs, outputs) of the edited matrices.
        ranks: of an update of one matrix, on average.
        each: operations of the editor for one token.
        held: bytes beside the parameters.
    """
    once = gradients(shape, text, layers)
    factors = SINGLE * ranks * sum(i + o for i, o in matrices)
    weights = sum(i * o for i, o in matrices)
    return Cost(
        held=SINGLE * parameters + held,
        forward=once.forward,
        trained=once.trained,
        passes=once.passes,
        heads=once.heads,
        operations=text.whole * each,
        peak=max(once.peak + 4 * factors, written(shape, len(matrices)) + factors),
        kept=shape.bytes * weights + factors,
        disk=factors,
    )


def statistics(matrices: list[tuple[int, int]]) -> int:
    """Bytes of mean and variance of every input of a pair network."""
    return 2 * DOUBLE * sum(i + o for i, o in matrices)


def mean_rank(text: Text, layers: int) -> float:
    """Tokens with a gradient: all but the last, and in the last block only those that predict the answer."""
    return ((layers - 1) * (text.whole - 1) + text.answer) / layers


def mend(shape: Shape, text: Text, layers: int = 3, rank: int = 1920) -> Cost:
    matrices = layers * shape.mlp
    parameters = pair_network(matrices, rank)
    each = sum(2 * 2 * 2 * min(rank, i + o) * (i + o) for i, o in matrices)
    ranks = mean_rank(text, layers)
    return learned(shape, text, layers, parameters, matrices, ranks, each, statistics(matrices))


def mend_step(shape: Shape, text: Text, layers: int = 3, rank: int = 1920, cases: int = 1) -> Cost:
    parameters = pair_network(layers * shape.mlp, rank)
    return training_step(shape, text, mend(shape, text, layers, rank), parameters, layers, cases)


def ke(shape: Shape, text: Text, layers: int = 3, hidden: int = 128, condition: int = 1024) -> Cost:
    matrices = layers * shape.mlp
    parameters = heads_of_ke(matrices, shape.width, hidden, condition)
    ranks = mean_rank(text, layers) + 1
    return learned(shape, text, layers, parameters, matrices, ranks, 2 * parameters)


def malmen(
    shape: Shape, text: Text, layers: int = 6, rank: int = 1920, edits: int = 1, batch: int = 32
) -> Cost:
    """N edits together: the network at the answers' tokens, then a regression; dense where they are many."""
    matrices = layers * [(shape.inner, shape.width)]
    width, tokens = shape.inner + shape.width, edits * text.answer
    parameters = pair_network(matrices, rank)
    once = gradients(shape, text, layers)
    smaller = min(tokens * width, shape.matrix)
    update = SINGLE * layers * smaller
    network = 2 * 2 * 2 * min(rank, width) * width
    pairs = SINGLE * layers * tokens * width
    return Cost(
        held=SINGLE * parameters + statistics(matrices),
        forward=edits * once.forward,
        trained=edits * once.trained,
        passes=math.ceil(edits / batch) * once.passes,
        heads=edits * once.heads,
        operations=layers * (tokens * network + 2 * tokens**2 * width),
        peak=pairs + max(min(edits, batch) * once.peak, written(shape, layers) + update),
        kept=layers * shape.bytes * shape.matrix + update,
        disk=update,
    )


def training_step(
    shape: Shape, text: Text, edit: Cost, parameters: int, layers: int, cases: int = 1
) -> Cost:
    """A step of MEND or KE on some cases: an edit, a paraphrase and an unrelated text each, of the same length.

    Parameters have a gradient and two moments. Texts are new; of cached ones the lower blocks are not run again.
    """
    scored = 2 * cases * text.whole
    heads = cases * (text.answer + 2 * text.whole)
    return Cost(
        held=edit.held,
        forward=3 * cases * edit.forward + cases * text.whole * layers,
        trained=cases * edit.trained + scored * layers,
        passes=edit.passes + 3 * layers,
        heads=cases * text.answer + heads,
        operations=3 * cases * edit.operations,
        peak=3 * SINGLE * parameters
        + (scored + cases * text.whole) * layers * shape.saved
        + heads * shape.distribution,
        kept=2 * SINGLE * parameters,
        disk=3 * SINGLE * parameters,
    )


# ---------------------------------------------------------------------------- memories


def grace(shape: Shape, text: Text, layer: int, steps: int = 100) -> Cost:
    """One key and one value; each step runs the edit from the block up."""
    above = shape.layers - layer
    entry = SINGLE * (shape.inner + shape.width + 1) + DOUBLE * text.answer
    return Cost(
        forward=text.whole * (shape.layers + 2 * layer),
        trained=steps * text.whole * above,
        passes=shape.layers + 3 * layer + 2 * steps * above,
        heads=steps * text.answer,
        peak=text.whole * above * shape.saved + text.answer * shape.distribution + entry,
        kept=entry,
        disk=entry,
    )


def wise(
    shape: Shape, text: Text, layer: int, steps: int = 70, contexts: int = 11, unrelated: float = 32 * 16
) -> Cost:  # fmt: skip
    """A side copy of one matrix; each step also reads its activation on unrelated prompts and the edit's."""
    rows, above = contexts * (text.whole + text.context), shape.layers - layer
    prompts = rows - contexts * text.answer
    copy = SINGLE * shape.matrix
    side = SINGLE * (unrelated + prompts) * (shape.inner + 2 * shape.width)
    return Cost(
        held=SINGLE * unrelated * shape.inner,
        forward=rows * (layer + 1),
        trained=steps * rows * above,
        passes=2 * layer + 2 * steps * above,
        heads=steps * contexts * text.answer,
        operations=steps * shape.matrix * (4 * (unrelated + prompts) + 6 * rows + 6),
        peak=5 * copy
        + side
        + rows * above * shape.saved
        + contexts * text.answer * shape.distribution,
        kept=copy,
        disk=copy,
    )


def in_context(
    shape: Shape, text: Text, demonstrations: int = 32, each: float = 27, edits: int = 1
) -> Cost:
    """IKE: nothing to learn. The passes are those of a first question to each of N edits.

    The demonstrations run once for each edit; their keys and values are kept for further questions.
    """
    shown = (demonstrations + 1) * each
    wide = shape.bytes * ((shape.inputs + 1) * shape.inner + 4 * shape.width)
    return Cost(
        held=ENCODER,
        forward=edits * (shown + text.whole) * shape.layers,
        passes=2 * edits * shape.layers,
        peak=edits * shown * (shape.layers * shape.cached + wide),
        kept=edits * SINGLE * VECTOR,
        disk=edits * SINGLE * VECTOR,
    )


def attention(shape: Shape) -> list[tuple[int, int]]:
    """(inputs, outputs) of a block's query and value projections."""
    return [(shape.width, shape.queries), (shape.width, shape.pairs)]
