/* The parts of an encoder layer's pass that are no large matrix product, for x86-64 CPUs with AVX512-BF16.

   `cpu.py` compiles this file and checks every argument; `reference.py` says in torch what each function computes.
   Activations are bf16 in row-major matrices: `*_step` is the distance of two rows in elements, columns lie side by
   side. Widths are multiples of 32, one vector register of bf16; ranks are multiples of 8. Sums, statistics and softmax
   are fp32. Nothing here is global, and nothing starts threads: each call computes on the thread that calls it.

   The one instruction that matters is VDPBF16PS (Intel SDM vol. 2): in each of 16 lanes, it adds the products of a pair
   of neighbouring bf16 to an fp32 sum. A product C += A B so takes pairs along the inner dimension: A's lie in memory
   already, and B's rows are interleaved in pairs ("panels", below). */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define UP(n, step) (((n) + (step) - 1) / (step) * (step))

/* bf16 in a register; rows whose sums over 32 columns fill 16 registers; tokens that stay in the nearest cache. */
enum { STRIP = 32, BLOCK = 8, TILE = 64 };

typedef int32_t pair __attribute__((may_alias)); /* two neighbouring bf16 */

/* ---- bf16 <-> fp32 ---------------------------------------------------------------------------------------------- */

INLINE __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m512 load16(const bf16 *x) { return widened(_mm256_loadu_si256((const __m256i *)x)); }
INLINE __m512 low_half(__m512i x) { return widened(_mm512_castsi512_si256(x)); }
INLINE __m512 high_half(__m512i x) { return widened(_mm512_extracti64x4_epi64(x, 1)); }
INLINE void store16(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }
INLINE __m512i narrowed(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
INLINE __m512 add_pairs(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

/* The next columns of the same rows are read next: other lines, which the CPU does not foresee. */
INLINE void read_ahead(const bf16 *x) { _mm_prefetch(x + STRIP, _MM_HINT_T0); }

/* ---- dropout ---------------------------------------------------------------------------------------------------- */

/* The dropout of one module's input, or none where `tokens` is null. See `dropout.py`: a feature is dropped where the
   hash of (token, module, feature) in 15 bits is at most the token's bound; each hash of 32 bits decides over two.
   pairs: the hashes of 0, 1, 2, ... for each pair of features. */
typedef struct {
    const int32_t *tokens;
    const int16_t *bounds;
    const int32_t *pairs;
    int32_t salt;
} Dropout;

static const uint32_t FIRST = 0x7FEB352D, SECOND = 0x846CA68B; /* lowbias32: nullprogram.com/blog/2018/07/31 */

INLINE uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * FIRST;
    x = (x ^ (x >> 15)) * SECOND;
    return x ^ (x >> 16);
}

INLINE uint32_t key_of(const Dropout *dropout, long token) {
    return mixed((uint32_t)dropout->tokens[token] ^ (uint32_t)dropout->salt);
}

/* Which of the 32 features from `column` on stay. */
INLINE __mmask32 kept(const Dropout *dropout, uint32_t key, int16_t bound, int column) {
    __m512i drawn = _mm512_loadu_si512(dropout->pairs + column / 2);
    drawn = _mm512_mullo_epi32(_mm512_xor_si512(_mm512_set1_epi32((int)key), drawn), _mm512_set1_epi32((int)FIRST));
    drawn = _mm512_mullo_epi32(_mm512_xor_si512(drawn, _mm512_srli_epi32(drawn, 15)), _mm512_set1_epi32((int)SECOND));
    drawn = _mm512_xor_si512(drawn, _mm512_srli_epi32(drawn, 16));
    drawn = _mm512_and_si512(drawn, _mm512_set1_epi32(0x7FFF7FFF));
    return _mm512_cmpgt_epi16_mask(drawn, _mm512_set1_epi16(bound));
}

/* ---- products --------------------------------------------------------------------------------------------------- */

/* A panel holds 32 columns of B: for each pair of B's rows two registers, 16 columns each, of interleaved pairs. */

INLINE void interleave(__m512i even, __m512i odd, __m512i *panel) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_store_si512(panel, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_store_si512(panel + 1, _mm512_permutex2var_epi16(even, second, odd));
}

/* Interleave 32 columns of the first two rows of `x`; a single row meets zeros. */
INLINE void pair_up(const bf16 *x, long step, long rows, bf16 *to) {
    __m512i odd = rows > 1 ? _mm512_loadu_si512(x + step) : _mm512_setzero_si512();
    interleave(_mm512_loadu_si512(x), odd, (__m512i *)to);
}

/* The panel of 32 columns of B, whose rows are those of `x`; an odd last row meets zeros. */
INLINE void pack_rows(const bf16 *x, long step, long rows, __m512i *panel) {
    for (long row = 0; row < rows; row += 2) {
        read_ahead(x + row * step);
        read_ahead(x + (row + 1) * step);
        pair_up(x + row * step, step, rows - row, (bf16 *)(panel + row));
    }
}

/* The panel of Bᵀ: its 32 columns are rows of `x`, zeros beyond `rows`; its rows are the `width` columns of `x`. */
INLINE void pack_columns(const bf16 *x, long step, long rows, int width, __m512i *panel) {
    for (int column = 0; column < width; column += STRIP)
        for (int half = 0; half < 2; half++) {
            __m512i a[16], b[16]; /* a transposition of 16 x 16 pairs, in four rounds of exchanges between registers */
            for (int i = 0; i < 16; i++) {
                long row = half * 16 + i;
                a[i] = row < rows ? _mm512_loadu_si512(x + row * step + column) : _mm512_setzero_si512();
                read_ahead(x + row * step + column);
            }
            for (int i = 0; i < 16; i += 2) {
                b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
                b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
            }
            for (int i = 0; i < 16; i += 4)
                for (int j = 0; j < 2; j++) {
                    a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
                    a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
                }
            for (int i = 0; i < 16; i += 8)
                for (int j = 0; j < 4; j++) {
                    b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + 4 + j], 0x88);
                    b[i + 4 + j] = _mm512_shuffle_i32x4(a[i + j], a[i + 4 + j], 0xDD);
                }
            for (int j = 0; j < 8; j++) {
                __m512i *to = panel + column + half;
                _mm512_store_si512(to + 2 * j, _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88));
                _mm512_store_si512(to + 2 * (8 + j), _mm512_shuffle_i32x4(b[j], b[8 + j], 0xDD));
            }
        }
}

/* sums[i] += row i of A times a panel. Pairs of A lie `row_step` and `pair_step` pairs apart. `rows` is a constant. */
INLINE void multiply_rows(int rows, const pair *a, long row_step, long pair_step, const __m512i *panel, long pairs,
                          __m512 sums[][2]) {
    for (long k = 0; k < pairs; k++) {
        __m512i first = _mm512_load_si512(panel + 2 * k), second = _mm512_load_si512(panel + 2 * k + 1);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            __m512i left = _mm512_set1_epi32(a[i * row_step + k * pair_step]);
            sums[i][0] = add_pairs(sums[i][0], left, first);
            sums[i][1] = add_pairs(sums[i][1], left, second);
        }
    }
}

/* Where the 32 columns of a product go. */
typedef struct {
    bf16 *narrow; /* bf16, or null */
    float *wide;  /* fp32, or null */
    long step;
    int adds;                 /* whether they are added to what is there */
    long ahead;               /* from there, what will be added to soon */
    const __mmask32 *changes; /* of each row, the columns of `narrow` to write; null: all */
} Target;

INLINE void finish_row(const Target *target, long row, __m512 sums[2]) {
    if (target->wide) {
        float *to = target->wide + row * target->step;
        if (target->adds) {
            sums[0] = _mm512_add_ps(sums[0], _mm512_loadu_ps(to));
            sums[1] = _mm512_add_ps(sums[1], _mm512_loadu_ps(to + 16));
        }
        _mm512_storeu_ps(to, sums[0]);
        _mm512_storeu_ps(to + 16, sums[1]);
        return;
    }
    bf16 *to = target->narrow + row * target->step;
    if (!target->adds) {
        _mm512_storeu_si512(to, narrowed(sums[0], sums[1]));
        return;
    }
    __m512i before = _mm512_loadu_si512(to);
    _mm_prefetch(to + target->ahead, _MM_HINT_T0);
    __m512i after = narrowed(_mm512_add_ps(sums[0], low_half(before)), _mm512_add_ps(sums[1], high_half(before)));
    if (target->changes) after = _mm512_mask_mov_epi16(before, target->changes[row], after);
    _mm512_storeu_si512(to, after);
}

INLINE void multiply_block(int block, long row, const pair *a, long row_step, long pair_step, const __m512i *panel,
                           long pairs, const Target *target) {
    __m512 sums[BLOCK][2];
#pragma GCC unroll 8
    for (int i = 0; i < block; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    multiply_rows(block, a + row * row_step, row_step, pair_step, panel, pairs, sums);
#pragma GCC unroll 8
    for (int i = 0; i < block; i++) finish_row(target, row + i, sums[i]);
}

/* Multiply `rows` rows of A by a panel. */
INLINE void multiply_panel(long rows, const bf16 *a, long row_step, long pair_step, const __m512i *panel, long pairs,
                           Target target) {
    const pair *a_pairs = (const pair *)a;
    long row = 0;
    for (; row + BLOCK <= rows; row += BLOCK)
        multiply_block(BLOCK, row, a_pairs, row_step, pair_step, panel, pairs, &target);
    if (row + 4 <= rows) {
        multiply_block(4, row, a_pairs, row_step, pair_step, panel, pairs, &target);
        row += 4;
    }
    for (; row < rows; row++) multiply_block(1, row, a_pairs, row_step, pair_step, panel, pairs, &target);
}

/* ---- low-rank products ------------------------------------------------------------------------------------------ */

/* Sum the lanes of each of 16 registers: lane i of the result is the sum of sums[i]. */
INLINE __m512 lane_sums(const __m512 *sums) {
    __m512 quarter[4];
    for (int i = 0; i < 4; i++) {
        __m512 a = sums[i], b = sums[4 + i], c = sums[8 + i], d = sums[12 + i];
        a = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        c = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
        quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(a, c, 0xDD));
    }
    __m512 a = quarter[0], b = quarter[1], c = quarter[2], d = quarter[3];
    a = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
    c = _mm512_add_ps(_mm512_shuffle_ps(c, d, 0x88), _mm512_shuffle_ps(c, d, 0xDD));
    return _mm512_add_ps(_mm512_shuffle_ps(a, c, 0x88), _mm512_shuffle_ps(a, c, 0xDD));
}

INLINE void project_loop(const bf16 *x, long x_step, const bf16 *matrix, const Dropout *dropout, int drops, bf16 *h,
                         long h_step, long rows, int width, int rank) {
    for (long row = 0; row < rows; row += 2) { /* two rows times eight of the matrix fill 16 registers with sums */
        long next = MIN(row + 1, rows - 1);
        uint32_t key = 0, next_key = 0;
        if (drops) key = key_of(dropout, row), next_key = key_of(dropout, next);
        for (int first = 0; first < rank; first += BLOCK) {
            __m512 sums[2 * BLOCK];
#pragma GCC unroll 16
            for (int i = 0; i < 2 * BLOCK; i++) sums[i] = _mm512_setzero_ps();
            for (int column = 0; column < width; column += STRIP) {
                __m512i a = _mm512_loadu_si512(x + row * x_step + column);
                __m512i b = _mm512_loadu_si512(x + next * x_step + column);
                _mm_prefetch(x + (row + 2) * x_step + column, _MM_HINT_T0);
                _mm_prefetch(x + (row + 3) * x_step + column, _MM_HINT_T0);
                if (drops) {
                    a = _mm512_maskz_mov_epi16(kept(dropout, key, dropout->bounds[row], column), a);
                    b = _mm512_maskz_mov_epi16(kept(dropout, next_key, dropout->bounds[next], column), b);
                }
#pragma GCC unroll 8
                for (int i = 0; i < BLOCK; i++) {
                    __m512i m = _mm512_loadu_si512(matrix + (long)(first + i) * width + column);
                    sums[i] = add_pairs(sums[i], a, m);
                    sums[BLOCK + i] = add_pairs(sums[BLOCK + i], b, m);
                }
            }
            __m256i both = (__m256i)_mm512_cvtneps_pbh(lane_sums(sums));
            _mm_storeu_si128((__m128i *)(h + row * h_step + first), _mm256_castsi256_si128(both));
            if (next > row)
                _mm_storeu_si128((__m128i *)(h + next * h_step + first), _mm256_extracti128_si256(both, 1));
        }
    }
}

/* h [rows, rank] = drop(x) [rows, width] times matrix [rank, width]ᵀ */
static void project(const bf16 *x, long x_step, const bf16 *matrix, const Dropout *dropout, bf16 *h, long h_step,
                    long rows, int width, int rank) {
    if (dropout->tokens)
        project_loop(x, x_step, matrix, dropout, 1, h, h_step, rows, width, rank);
    else
        project_loop(x, x_step, matrix, dropout, 0, h, h_step, rows, width, rank);
}

/* Pairs of tokens [rows / 2, rank] of h [rows, rank]; an odd last token meets zeros. */
INLINE void pair_tokens(const bf16 *h, long h_step, long rows, int rank, bf16 *pairs) {
    const __m128i zeros = _mm_setzero_si128();
    for (long row = 0; row < rows; row += 2)
        for (int first = 0; first < rank; first += BLOCK) {
            __m128i even = _mm_loadu_si128((const __m128i *)(h + row * h_step + first)), odd = zeros;
            if (row + 1 < rows) odd = _mm_loadu_si128((const __m128i *)(h + (row + 1) * h_step + first));
            __m128i *to = (__m128i *)(pairs + row * rank + 2 * first);
            _mm_storeu_si128(to, _mm_unpacklo_epi16(even, odd));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(even, odd));
        }
}

/* of_matrix [rank, 32 columns] += hᵀ x for a tile of tokens, h in pairs of them; only what `changes` keeps of x counts,
   where it is not null. */
INLINE void add_outer(const bf16 *x, long x_step, const bf16 *h_pairs, const __mmask32 *changes, float *of_matrix,
                      long rows, int width, int rank) {
    __m512i panel[TILE];
    for (long row = 0; row < rows; row += 2) {
        __m512i even = _mm512_loadu_si512(x + row * x_step), odd = _mm512_setzero_si512();
        if (row + 1 < rows) odd = _mm512_loadu_si512(x + (row + 1) * x_step);
        read_ahead(x + row * x_step);
        read_ahead(x + (row + 1) * x_step);
        if (changes) {
            even = _mm512_maskz_mov_epi16(changes[row], even);
            odd = _mm512_maskz_mov_epi16(changes[row + 1], odd);
        }
        interleave(even, odd, panel + row);
    }
    Target target = {.wide = of_matrix, .step = width, .adds = 1};
    multiply_panel(rank, h_pairs, 1, rank, panel, (rows + 1) / 2, target);
}

/* Rows of a matrix in segments, and modules that read one input: a stack [modules, segments, rank, width] has a matrix
   for each where `adapts` [modules, segments] is not 0; all else of a module and segment is left as it is. `ends`:
   where each segment ends. h: [n, modules, rank]. */
typedef struct {
    int32_t num_modules, num_segments, rank, width;
    const int64_t *ends;
    const int32_t *adapts;
} Groups;

/* One module and segment. rows: of the segment, from `start` on. h: place in h. columns: place in outputs [n, modules *
   width]. stack: place in a stack. */
typedef struct {
    int64_t rows, start, h, columns, stack;
    int module, segment;
} Group;

INLINE int find(const Groups *groups, int number, Group *group) {
    int module = number / groups->num_segments, segment = number % groups->num_segments;
    int64_t start = segment ? groups->ends[segment - 1] : 0;
    *group = (Group){
        .rows = groups->ends[segment] - start,
        .start = start,
        .h = (start * groups->num_modules + module) * groups->rank,
        .columns = (int64_t)module * groups->width,
        .stack = (int64_t)number * groups->rank * groups->width,
        .module = module,
        .segment = segment,
    };
    return groups->adapts[number];
}

#define EACH(groups, group)                                                                                   \
    for (int number = 0; number < (groups)->num_modules * (groups)->num_segments; number++)                   \
        if (find(groups, number, group))

INLINE int64_t h_step_of(const Groups *groups) { return (int64_t)groups->num_modules * groups->rank; }

/* What is dropped in a pass, for all modules; no tokens: nothing. drops: whether a segment drops any. */
typedef struct {
    const int32_t *tokens, *pairs, *salts, *drops;
    const int16_t *bounds;
} Masks;

INLINE Dropout dropout_of(const Masks *masks, const Group *group) {
    if (!masks->tokens || !masks->drops[group->segment]) return (Dropout){0};
    const int32_t *tokens = masks->tokens + group->start;
    return (Dropout){tokens, masks->bounds + group->start, masks->pairs, masks->salts[group->module]};
}

/* h = drop(x) aᵀ */
void lora_down(const bf16 *x, int64_t x_step, const bf16 *a, const Groups *groups, const Masks *masks, bf16 *h) {
    Group group;
    EACH(groups, &group) {
        Dropout dropout = dropout_of(masks, &group);
        project(x + group.start * x_step, x_step, a + group.stack, &dropout, h + group.h, h_step_of(groups), group.rows,
                groups->width, groups->rank);
    }
}

/* Memory of a call: the panels of a matrix, and a tile's pairs. Null without memory. */
typedef struct {
    __m512i *panels;
    bf16 *pairs;
} Room;

INLINE Room room_for(const Groups *groups) {
    size_t matrix = (size_t)groups->rank * groups->width * sizeof(bf16);
    char *memory = aligned_alloc(64, matrix + (size_t)TILE * groups->rank * sizeof(bf16));
    return (Room){(__m512i *)memory, memory ? (bf16 *)(memory + matrix) : NULL};
}

INLINE void pack_matrix(const bf16 *matrix, const Groups *groups, __m512i *panels) {
    for (int column = 0; column < groups->width; column += STRIP)
        pack_rows(matrix + column, groups->width, groups->rank, panels + column / STRIP * groups->rank);
}

/* out [n, modules * width] += h b. Returns 0, or 1 without memory, as those below. */
int lora_up(bf16 *out, int64_t out_step, const bf16 *h, const bf16 *b, const Groups *groups) {
    const Room room = room_for(groups);
    const int64_t h_step = h_step_of(groups);
    Group group;
    if (!room.panels) return 1;
    EACH(groups, &group) {
        pack_matrix(b + group.stack, groups, room.panels);
        for (int64_t row = 0; row < group.rows; row += BLOCK) /* rows in full, which the CPU reads ahead */
            for (int column = 0; column < groups->width; column += STRIP)
                multiply_panel(MIN(BLOCK, group.rows - row), h + group.h + row * h_step, h_step / 2, 1,
                               room.panels + column / STRIP * groups->rank, groups->rank / 2,
                               (Target){.narrow = out + (group.start + row) * out_step + group.columns + column,
                                        .step = out_step,
                                        .adds = 1,
                                        .ahead = BLOCK * out_step});
    }
    free(room.panels);
    return 0;
}

/* Of g [n, modules * width], the gradient of the output: of_h = g bᵀ, and of_b, zeros before, = hᵀ g. */
int lora_up_gradients(const bf16 *g, int64_t g_step, const bf16 *h, const bf16 *b, const Groups *groups, bf16 *of_h,
                      float *of_b) {
    const Room room = room_for(groups);
    const int64_t h_step = h_step_of(groups);
    const int width = groups->width, rank = groups->rank;
    const Dropout none = {0};
    Group group;
    if (!room.panels) return 1;
    EACH(groups, &group) {
        for (int64_t start = 0; start < group.rows; start += TILE) {
            int64_t count = MIN(TILE, group.rows - start), at = group.h + start * h_step;
            const bf16 *own = g + (group.start + start) * g_step + group.columns;
            project(own, g_step, b + group.stack, &none, of_h + at, h_step, count, width, rank);
            pair_tokens(h + at, h_step, count, rank, room.pairs);
            for (int column = 0; column < width; column += STRIP)
                add_outer(own + column, g_step, room.pairs, NULL, of_b + group.stack + column, count, width, rank);
        }
    }
    free(room.panels);
    return 0;
}

/* of_a, zeros before, = of_hᵀ drop(x); of_x += drop(of_h a), where `of_x` is not null. */
int lora_down_gradients(bf16 *of_x, int64_t of_x_step, const bf16 *of_h, const bf16 *x, int64_t x_step, const bf16 *a,
                        const Groups *groups, const Masks *masks, float *of_a) {
    const Room room = room_for(groups);
    const int64_t h_step = h_step_of(groups);
    const int width = groups->width, rank = groups->rank;
    Group group;
    if (!room.panels) return 1;
    EACH(groups, &group) {
        Dropout dropout = dropout_of(masks, &group);
        if (of_x) pack_matrix(a + group.stack, groups, room.panels);
        for (int64_t start = 0; start < group.rows; start += TILE) {
            int64_t count = MIN(TILE, group.rows - start);
            const bf16 *own_h = of_h + group.h + start * h_step;
            uint32_t keys[TILE];
            __mmask32 drawn[TILE + 1] = {0}, *changes = dropout.tokens ? drawn : NULL;
            for (int64_t row = 0; changes && row < count; row++) keys[row] = key_of(&dropout, start + row);
            pair_tokens(own_h, h_step, count, rank, room.pairs);
            for (int column = 0; column < width; column += STRIP) {
                for (int64_t row = 0; changes && row < count; row++)
                    drawn[row] = kept(&dropout, keys[row], dropout.bounds[start + row], column);
                add_outer(x + (group.start + start) * x_step + column, x_step, room.pairs, changes,
                          of_a + group.stack + column, count, width, rank);
                if (of_x)
                    multiply_panel(count, own_h, h_step / 2, 1, room.panels + column / STRIP * rank, rank / 2,
                                   (Target){.narrow = of_x + (group.start + start) * of_x_step + column,
                                            .step = of_x_step,
                                            .adds = 1,
                                            .ahead = STRIP,
                                            .changes = changes});
            }
        }
    }
    free(room.panels);
    return 0;
}

/* ---- GELU ------------------------------------------------------------------------------------------------------- */

/* 2^y for y <= 0: 2^k 2^f with k the nearest integer, and for |f| <= 1/2 the polynomial of degree 4 whose largest
   relative error is least (3e-6, a thousandth of what bf16 rounds away). */
INLINE __m512 power_of_two(__m512 y) {
    y = _mm512_max_ps(_mm512_set1_ps(-150.0f), y); /* 0 there; infinity would become NaN, and NaN stays */
    __m512 k = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(y, k);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.00957010221f), f, _mm512_set1_ps(0.0559178628f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240247443f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693121791f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999999285f));
    return _mm512_scalef_ps(p, k);
}

/* u = z Φ(z), and its derivative Φ(z) + z φ(z), where slope is not null; Φ and φ of the standard normal distribution.
   Φ(z) = (1 + erf(z / √2)) / 2, and for x >= 0 (Abramowitz & Stegun 7.1.26, absolute error 1.5e-7)
   erf(x) = 1 - (a1 t + a2 t² + a3 t³ + a4 t⁴ + a5 t⁵) e^(-x²), t = 1 / (1 + 0.3275911 x). */
void gelu(const bf16 *z, bf16 *u, bf16 *slope, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) {
        __m512 value = load16(z + i);
        __m512 x = _mm512_mul_ps(_mm512_abs_ps(value), _mm512_set1_ps(0.70710678f));
        __m512 e = power_of_two(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-1.44269504f))); /* log2(e) */
        __m512 t = _mm512_rcp14_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
        __m512 p = _mm512_fmadd_ps(t, _mm512_set1_ps(1.061405429f / 2), _mm512_set1_ps(-1.453152027f / 2));
        p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f / 2));
        p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f / 2));
        p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f / 2));
        __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), e); /* Φ(-|z|) */
        __mmask16 positive = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GE_OQ);
        __m512 phi = _mm512_mask_sub_ps(tail, positive, _mm512_set1_ps(1.0f), tail);
        store16(u + i, _mm512_mul_ps(value, phi));
        if (slope) { /* 1 / √(2π) */
            __m512 scaled = _mm512_mul_ps(value, _mm512_set1_ps(0.39894228f));
            store16(slope + i, _mm512_fmadd_ps(scaled, e, phi));
        }
    }
}

/* g *= slope */
void multiply(bf16 *g, const bf16 *slope, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) store16(g + i, _mm512_mul_ps(load16(g + i), load16(slope + i)));
}

/* ---- LayerNorm -------------------------------------------------------------------------------------------------- */

/* normal = (s - mean) rstd of each row of s = x + y, rstd = 1 / √(variance + epsilon); out = normal weight + bias.
   normal and rstd, which the backward pass reads, may be null. Matrices without gaps. */
void add_norm(const bf16 *x, const bf16 *y, const float *weight, const float *bias, float epsilon, bf16 *out,
              bf16 *normal, float *rstd, int64_t rows, int width) {
    float sum[width];
    for (int64_t row = 0; row < rows; row++, x += width, y += width, out += width) {
        __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int i = 0; i < width; i += 16) {
            __m512 s = _mm512_add_ps(load16(x + i), load16(y + i));
            _mm512_storeu_ps(sum + i, s);
            total = _mm512_add_ps(total, s);
        }
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / width);
        for (int i = 0; i < width; i += 16) {
            __m512 s = _mm512_sub_ps(_mm512_loadu_ps(sum + i), mean);
            squares = _mm512_fmadd_ps(s, s, squares);
        }
        float own = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / width + epsilon);
        for (int i = 0; i < width; i += 16) {
            __m512 s = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(sum + i), mean), _mm512_set1_ps(own));
            if (normal) store16(normal + row * width + i, s);
            store16(out + i, _mm512_fmadd_ps(s, _mm512_loadu_ps(weight + i), _mm512_loadu_ps(bias + i)));
        }
        if (rstd) rstd[row] = own;
    }
}

/* The gradient of s, of the gradient g (+ other, where it is not null) of `out`: with v = (g + other) weight,
   rstd (v - mean(v) - normal mean(v normal)), the means over a row (Ba, Kiros & Hinton 2016, differentiated). */
void add_norm_gradient(const bf16 *g, const bf16 *other, const bf16 *normal, const float *rstd, const float *weight,
                       bf16 *of_sum, int64_t rows, int width) {
    float v[width];
    for (int64_t row = 0; row < rows; row++, g += width, normal += width, of_sum += width) {
        __m512 total = _mm512_setzero_ps(), along = _mm512_setzero_ps();
        for (int i = 0; i < width; i += 16) {
            __m512 own = load16(g + i);
            if (other) own = _mm512_add_ps(own, load16(other + row * width + i));
            own = _mm512_mul_ps(own, _mm512_loadu_ps(weight + i));
            _mm512_storeu_ps(v + i, own);
            total = _mm512_add_ps(total, own);
            along = _mm512_fmadd_ps(own, load16(normal + i), along);
        }
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / width);
        __m512 share = _mm512_set1_ps(_mm512_reduce_add_ps(along) / width);
        for (int i = 0; i < width; i += 16) {
            __m512 own = _mm512_sub_ps(_mm512_loadu_ps(v + i), mean);
            own = _mm512_fnmadd_ps(load16(normal + i), share, own);
            store16(of_sum + i, _mm512_mul_ps(own, _mm512_set1_ps(rstd[row])));
        }
    }
}

/* ---- attention -------------------------------------------------------------------------------------------------- */

/* Rows of tokens; queries are all tokens, or one a row where `first_only`. Heads lie side by side in the columns, each
   `size` wide. Matrix i of `steps` belongs to q, k, v and the output in this order. */
typedef struct {
    const int32_t *offsets; /* [rows + 1] */
    int32_t num_rows, longest, num_heads, size, first_only;
    float scale;
} Rows;

INLINE long queries_of(const Rows *rows, int row, long *start) {
    *start = rows->first_only ? row : rows->offsets[row];
    return rows->first_only ? 1 : rows->offsets[row + 1] - rows->offsets[row];
}

/* shares [keys] = softmax(scale scores), with zeros beyond, up to a multiple of 32. */
INLINE void softmax(float *scores, bf16 *shares, long keys, float scale) {
    __m512 highest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    __m512 factor = _mm512_set1_ps(1.44269504f * scale); /* log2(e): for powers of two */
    for (long i = 0; i < keys; i += 16) {
        __mmask16 there = keys - i >= 16 ? 0xFFFF : (1u << (keys - i)) - 1;
        highest = _mm512_mask_max_ps(highest, there, highest, _mm512_loadu_ps(scores + i));
    }
    highest = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(highest)), factor);
    for (long i = 0; i < keys; i += 16) {
        __mmask16 there = keys - i >= 16 ? 0xFFFF : (1u << (keys - i)) - 1;
        __m512 power = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factor, highest));
        power = _mm512_maskz_mov_ps(there, power);
        _mm512_storeu_ps(scores + i, power);
        total = _mm512_add_ps(total, power);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (long i = 0; i < UP(keys, STRIP); i += 16)
        store16(shares + i, i < keys ? _mm512_mul_ps(_mm512_loadu_ps(scores + i), share) : _mm512_setzero_ps());
}

/* The panel of 32 columns from `column` on, of a matrix of `pairs` pairs of rows. */
INLINE __m512i *panel_of(__m512i *panels, long column, long pairs) { return panels + column / STRIP * 2 * pairs; }

/* Pack Bᵀ of all rows of x [rows, size]. */
INLINE void pack_all_columns(const bf16 *x, long step, long rows, long size, __m512i *panels) {
    for (long row = 0; row < rows; row += STRIP)
        pack_columns(x + row * step, step, MIN(STRIP, rows - row), size, panel_of(panels, row, size / 2));
}

/* Pack B = x [rows, size]. */
INLINE void pack_all_rows(const bf16 *x, long step, long rows, long size, __m512i *panels) {
    for (long column = 0; column < size; column += STRIP)
        pack_rows(x + column, step, rows, panel_of(panels, column, UP(rows, 2) / 2));
}

/* context = softmax(scale q kᵀ) v. shares [queries, heads, UP(longest, 32)] keeps the softmax; null: not kept.
   Returns 0, or 1 without memory. */
int attention(const bf16 *q, const bf16 *k, const bf16 *v, const int64_t *steps, const Rows *rows, bf16 *context,
              bf16 *shares) {
    const long size = rows->size, room = UP(rows->longest, STRIP), heads = rows->num_heads;
    char *memory = aligned_alloc(64, 2 * room * size * sizeof(bf16) + BLOCK * room * (sizeof(float) + sizeof(bf16)));
    if (!memory) return 1;
    __m512i *k_panels = (__m512i *)memory, *v_panels = k_panels + room * size / STRIP;
    float *scores = (float *)(v_panels + room * size / STRIP);
    bf16 *own_shares = (bf16 *)(scores + BLOCK * room);
    for (int row = 0; row < rows->num_rows; row++) {
        long from, keys_from = rows->offsets[row], keys = rows->offsets[row + 1] - keys_from;
        long queries = queries_of(rows, row, &from), pairs = UP(keys, 2) / 2;
        for (long head = 0; head < heads; head++) {
            pack_all_columns(k + keys_from * steps[1] + head * size, steps[1], keys, size, k_panels);
            pack_all_rows(v + keys_from * steps[2] + head * size, steps[2], keys, size, v_panels);
            for (long query = from; query < from + queries; query += BLOCK) {
                long count = MIN(BLOCK, from + queries - query), to_step = shares ? heads * room : room;
                const bf16 *own_q = q + query * steps[0] + head * size;
                for (long i = 0; i < count; i++) read_ahead(own_q + i * steps[0] + size - STRIP); /* the next head's */
                bf16 *to = shares ? shares + (query * heads + head) * room : own_shares;
                bf16 *own_context = context + query * steps[3] + head * size;
                for (long key = 0; key < keys; key += STRIP) {
                    Target target = {.wide = scores + key, .step = room};
                    multiply_panel(count, own_q, steps[0] / 2, 1, panel_of(k_panels, key, size / 2), size / 2, target);
                }
                for (long i = 0; i < count; i++) softmax(scores + i * room, to + i * to_step, keys, rows->scale);
                for (long column = 0; column < size; column += STRIP) {
                    Target target = {.narrow = own_context + column, .step = steps[3]};
                    multiply_panel(count, to, to_step / 2, 1, panel_of(v_panels, column, pairs), pairs, target);
                }
            }
        }
    }
    free(memory);
    return 0;
}

/* of_scores [keys] = scale shares (of_shares - sum(shares of_shares)) of one query. */
INLINE void softmax_gradient(const float *of_shares, const bf16 *shares, bf16 *of_scores, long keys, float scale) {
    __m512 total = _mm512_setzero_ps();
    for (long i = 0; i < keys; i += STRIP) read_ahead(shares + i + UP(keys, STRIP) - STRIP); /* the next head's */
    for (long i = 0; i < keys; i += 16) /* beyond the keys, shares are 0 */
        total = _mm512_fmadd_ps(load16(shares + i), _mm512_loadu_ps(of_shares + i), total);
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total)), factor = _mm512_set1_ps(scale);
    for (long i = 0; i < UP(keys, STRIP); i += 16) {
        __m512 own = _mm512_sub_ps(_mm512_loadu_ps(of_shares + i), mean);
        store16(of_scores + i, _mm512_mul_ps(_mm512_mul_ps(load16(shares + i), factor), own));
    }
}

/* Gradients of q, k and v, of the gradient g of the context; steps of q, k, v, g, of_q, of_k, of_v. Returns 0, or 1
   without memory.
   With P the shares and S the scores: of_v = Pᵀ g, of_P = g vᵀ, of_S = scale P (of_P - rowsum(P of_P)),
   of_q = of_S k, of_k = of_Sᵀ q. */
int attention_gradients(const bf16 *g, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *shares,
                        const int64_t *steps, const Rows *rows, bf16 *of_q, bf16 *of_k, bf16 *of_v) {
    const long size = rows->size, room = UP(rows->longest, STRIP), heads = rows->num_heads;
    const long panels = room * size / STRIP, queries_room = rows->first_only ? BLOCK : room;
    const long of_block = BLOCK * room * (sizeof(float) + sizeof(bf16));
    char *memory = aligned_alloc(64, (4 * size + 2 * queries_room) * room * sizeof(bf16) + of_block);
    if (!memory) return 1;
    __m512i *v_panels = (__m512i *)memory, *k_panels = v_panels + panels, *q_panels = k_panels + panels;
    __m512i *g_panels = q_panels + panels;
    float *of_shares = (float *)(g_panels + panels);
    bf16 *of_scores = (bf16 *)(of_shares + BLOCK * room);
    bf16 *share_pairs = of_scores + BLOCK * room, *score_pairs = share_pairs + queries_room * room;
    for (int row = 0; row < rows->num_rows; row++) {
        long from, keys_from = rows->offsets[row], keys = rows->offsets[row + 1] - keys_from;
        long queries = queries_of(rows, row, &from), pairs = UP(keys, 2) / 2, query_pairs = UP(queries, 2) / 2;
        for (long head = 0; head < heads; head++) {
            const bf16 *own_g = g + from * steps[3] + head * size;
            bf16 *own_of_q = of_q + from * steps[4] + head * size;
            bf16 *own_of_k = of_k + keys_from * steps[5] + head * size;
            bf16 *own_of_v = of_v + keys_from * steps[6] + head * size;
            pack_all_rows(q + from * steps[0] + head * size, steps[0], queries, size, q_panels);
            pack_all_rows(k + keys_from * steps[1] + head * size, steps[1], keys, size, k_panels);
            pack_all_columns(v + keys_from * steps[2] + head * size, steps[2], keys, size, v_panels);
            pack_all_rows(own_g, steps[3], queries, size, g_panels);
            for (long query = 0; query < queries; query += BLOCK) {
                long count = MIN(BLOCK, queries - query), share_step = heads * room;
                const bf16 *own = shares + ((from + query) * heads + head) * room, *block_g = own_g + query * steps[3];
                for (long key = 0; key < keys; key += STRIP) {
                    Target target = {.wide = of_shares + key, .step = room};
                    __m512i *panel = panel_of(v_panels, key, size / 2);
                    multiply_panel(count, block_g, steps[3] / 2, 1, panel, size / 2, target);
                }
                for (long i = 0; i < count; i++)
                    softmax_gradient(of_shares + i * room, own + i * share_step, of_scores + i * room, keys,
                                     rows->scale);
                for (long column = 0; column < size; column += STRIP) {
                    Target target = {.narrow = own_of_q + query * steps[4] + column, .step = steps[4]};
                    multiply_panel(count, of_scores, room / 2, 1, panel_of(k_panels, column, pairs), pairs, target);
                }
                for (long i = 0; i < count; i += 2) /* of two queries, for the sums over queries */
                    for (long key = 0; key < keys; key += STRIP) {
                        long to = ((query + i) / 2 * room + key) * 2;
                        pair_up(own + i * share_step + key, share_step, count - i, share_pairs + to);
                        pair_up(of_scores + i * room + key, room, count - i, score_pairs + to);
                    }
            }
            for (long column = 0; column < size; column += STRIP) {
                Target to_k = {.narrow = own_of_k + column, .step = steps[5]};
                Target to_v = {.narrow = own_of_v + column, .step = steps[6]};
                __m512i *panel = panel_of(q_panels, column, query_pairs);
                multiply_panel(keys, score_pairs, 1, room, panel, query_pairs, to_k);
                panel = panel_of(g_panels, column, query_pairs);
                multiply_panel(keys, share_pairs, 1, room, panel, query_pairs, to_v);
            }
        }
    }
    free(memory);
    return 0;
}

/* ---- AdamW ------------------------------------------------------------------------------------------------------ */

INLINE double square_sum(const float *x, int64_t size) {
    double total = 0.0;
    for (int64_t start = 0; start < size; start += 1024) { /* few in fp32, where sums would lose digits */
        float sums[16] = {0};
        int64_t count = MIN(1024, size - start), whole = count / 16 * 16;
        for (int64_t i = 0; i < whole; i += 16)
            for (int lane = 0; lane < 16; lane++) sums[lane] += x[start + i + lane] * x[start + i + lane];
        for (int64_t i = whole; i < count; i++) sums[i - whole] += x[start + i] * x[start + i];
        for (int lane = 0; lane < 16; lane++) total += sums[lane];
    }
    return total;
}

/* A step of all slots by decoupled AdamW (Loshchilov & Hutter 2019), their gradients clipped; see `optimizer.py`. The
   columns from `frozen_start` to `frozen_stop` have no gradient where a slot is `frozen`. corrections: 1 - beta^step.
   */
void adamw(float *weights, float *first, float *second, const float *gradients, const float *decays, int64_t slots,
           int64_t columns, const uint8_t *frozen, int64_t frozen_start, int64_t frozen_stop, const float *rates,
           const float *first_corrections, const float *second_corrections, float first_beta, float second_beta,
           float epsilon, float weight_decay, float max_norm, float *norms) {
    const int64_t ends[] = {0, frozen_start, frozen_stop, columns};
    for (int64_t slot = 0; slot < slots; slot++) {
        float *restrict w = weights + slot * columns, *restrict m = first + slot * columns;
        float *restrict v = second + slot * columns;
        const float *restrict g = gradients + slot * columns;
        double squares = 0.0;
        for (int part = 0; part < 3; part++)
            if (part != 1 || !frozen[slot]) squares += square_sum(g + ends[part], ends[part + 1] - ends[part]);
        float norm = sqrtf((float)squares), kept = max_norm > 0 ? fminf(max_norm / (norm + 1e-6f), 1.0f) : 1.0f;
        float by_first = 1.0f / first_corrections[slot], by_second = 1.0f / second_corrections[slot];
        norms[slot] = norm;
        for (int part = 0; part < 3; part++) {
            int trains = part != 1 || !frozen[slot];
            float scale = trains ? kept : 0.0f, rate = trains ? rates[slot] : 0.0f;
            for (int64_t i = ends[part]; i < ends[part + 1]; i++) {
                float own = g[i] * scale;
                m[i] += (1.0f - first_beta) * (own - m[i]);
                v[i] = second_beta * v[i] + (1.0f - second_beta) * own * own;
                float change = m[i] * by_first / (sqrtf(v[i] * by_second) + epsilon);
                w[i] -= rate * (change + weight_decay * decays[i] * w[i]);
            }
        }
    }
}
