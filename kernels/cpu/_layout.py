"""The memory layout of a program: int64 words that Python writes and compiled code reads.

A program is a list of phases, each an operation on all rows of a step, cut into chunks. Every
thread has a share of them, consecutive chunks, so that it reads one stream of weights; it takes
them from its share's counter, and then what is left of the other shares. A phase ends when its
chunks are done, no matter by which threads: a thread that is late, or suspended between two chunks,
delays no other.
"""

# Operations.
LINEAR, QKV, ATTEND, GATE_UP, PROJECT, NORM, EMBED, READ, PICK, DRAFT = range(10)

# Words of a program's head. The rows of a step are T of each of B sequences, R = B T in all.
(
    PHASES,  # number of phases
    PHASE_TABLE,  # address of [phases, PHASE_WORDS]
    TICKETS,  # address of [phases, THREADS, COUNTER_WORDS]: epoch, and next chunk of the share
    DONE,  # address of [phases, COUNTER_WORDS]: chunks done
    SCRATCH,  # address of a thread's own memory, [threads, SCRATCH_BYTES]
    SCRATCH_BYTES,
    BATCH,  # B
    WINDOW_ROWS,  # T
    LENGTHS,  # address of [B] int64: committed tokens
    PAGE_TABLE,  # address of [B, TABLE_STRIDE] int32
    TABLE_STRIDE,
    IDS,  # address of [R] int64: tokens of the window
    THREADS,  # number of shares
    EPOCH,  # number of the next step, modulo 2^31
    # Of the heads that ROWS_OF names, one for each draft, side by side:
    SKIPPED,  # 1: their phases are skipped
    LEAST,  # float32 bits: the probability that all drafts are accepted, below which drafting ends
    HEAD_WORDS,
) = range(17)

# Words of a phase.
(
    OP,
    CHUNKS,  # number of chunks; of ATTEND it follows from the lengths
    BLOCKS,  # blocks of 8 outputs per chunk
    X,  # address of [R, X_STRIDE] float32
    X_STRIDE,  # in elements, as all strides
    OUT,  # address of [R, OUT_STRIDE] float32
    OUT_STRIDE,
    RESIDUAL,  # address of [R, RESIDUAL_STRIDE] float32 that is added, or 0; may be OUT
    RESIDUAL_STRIDE,
    NORM_W,  # address of [K] float32, or 0: x is taken as it is
    EPS,  # float32 bits
    TILE,  # address of the weight's matmul tile
    WEIGHT,  # address of its blocks
    BLOCK_BYTES,
    ALL_BLOCKS,
    INPUTS,  # K; rows are padded with zeros to whole lanes
    GROUPS,  # of 32 inputs
    QUANTISED,  # 1: activations are quantised to 8 bits
    BIAS,  # address of [8 ALL_BLOCKS] float32, or 0
    OUTPUTS,  # N
    FIRST_HEAD,  # of Q, K and V together, that the weight of a QKV phase computes
    HEADS,  # query heads
    KV_HEADS,
    HEAD_DIM,  # padded
    HEAD_COUNT,  # numbers per head that are not padding
    K_PAGES,  # address of [pages, page_size, Hk, D]
    V_PAGES,
    PAGE_SIZE,
    KV_KIND,  # FP32, FP16 or BF16
    COS,  # address of [positions, D] float32
    SIN,  # address of [positions, D] float32, first half negated
    Q_NORM,  # address of [D] float32, or 0
    K_NORM,
    SLIDING,  # positions that a row sees; 0: all
    SCALE,  # float32 bits
    PARTIALS,  # address of the chunks' partial results
    MERGES,  # address of int64 counters, zero between phases
    MAX_SPLITS,
    BEST,  # out, address of [R, 3] 64-bit words: id, value bits, log-sum-exp bits
    WRITE_LOGITS,  # 1: OUT holds logits; 0: they stay in scratch
    WEIGHT_FORMAT,  # index into FORMATS, for EMBED
    ROWS_OF,  # address of the head that describes the rows, or 0: the program's
    TOKEN_IDS,  # address of [V] int64, for DRAFT
    CHOSEN,  # out, address of [B] int64, for DRAFT
    PROBABILITIES,  # out, address of [B] float32, for DRAFT
    PHASE_WORDS,
) = range(46)

FP32, FP16, BF16 = range(3)

# Counters that several threads change have a cache line each.
COUNTER_WORDS = 8

# Keys per split of the cache: split i holds the same keys whatever the length of the sequence.
SPLIT = 128
# Keys that are converted to float32 at a time.
KEYS = 64
# Blocks of 8 outputs in a chunk of the vocabulary; sums of exponentials are taken per chunk.
VOCABULARY_BLOCKS = 32

# Words of `end_step`.
(
    WINDOW,  # address of [B, T] int64
    WINDOW_STRIDE,
    TARGET,  # address of [B, T] int64
    TARGET_STRIDE,
    TARGET_STEP,  # from row to row
    LARGEST,  # address of [B, T] float32
    LARGEST_STRIDE,
    LARGEST_STEP,
    LOGPROBS,  # address of [B, T] float32, contiguous, or 0
    ACCEPTED,  # out, address of [B] int64
    COUNT,  # out, address of [B] int64
    TOKENS,  # from here on the fields of `Progress` (kernels/advance.py)
    TOKENS_STRIDE,
    COMMITTED,  # its lengths
    ACTIVE,
    LIMITS,
    ENDS,
    ENDS_STRIDE,
    ENDS_COUNT,
    SOURCE,
    DRAFTED,
    CLOCK,
    RING,
    RING_SLOTS,
    RING_STRIDE,  # from slot to slot
    RING_STEP,  # from sequence to sequence
    END_WORDS,
) = range(27)

# Words of `draft_ngram`.
(
    TEXT,  # address of [B, ...] int64
    TEXT_STRIDE,
    TEXT_LENGTHS,  # address of [B] int64: committed tokens, after which one more is known
    SIZE,
    COPIED,  # out, address of [B, K] int64, contiguous
    FOUND,  # out, address of [B] bytes
    NGRAM_WORDS,
) = range(7)
