/* Label maps of bytes: undoes the filters of a PNG, counts and maps values, and moves them as a view does.

   Pillow takes four times as long as `unfilter` to undo Paeth's filter, and NumPy has no fast look-ups
   in or of bytes. All functions release the GIL, and raise ValueError. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_SHUFFLES __builtin_cpu_supports("ssse3")
#else
#define HAS_SHUFFLES 0
#endif

#if defined(__x86_64__) && defined(__GLIBC__)
#define FAST __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define FAST
#endif
#define LITTLE (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)

typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint64_t words __attribute__((vector_size(16)));

/* Paeth's predictor of a pixel from those to the left, above, and above to the left (PNG section
   9.4). Without branches: label maps change at random. */
static inline uint8_t paeth(int left, int above, int corner) {
    int by_left = abs(above - corner), by_above = abs(left - corner);
    int by_corner = abs(left + above - 2 * corner);
    int best = by_above <= by_corner ? above : corner;
    return (by_left <= by_above) & (by_left <= by_corner) ? left : best;
}

enum {
    WORD = 8,       /* bytes that are read at a time: most of a label map is equal to its neighbours */
    BITS = 64,      /* of a word */
    TABLES = 4,     /* of counts: equal neighbours would wait for each other */
    FILL = 255,     /* the label of ignored pixels */
    BLOCK = 16,     /* output pixels that are moved at a time */
    CHECKED = 32,   /* rows after which `is_mixed` may be decided */
    MOST = 1 << 30, /* pixels of a side */
};

static inline uint64_t word(const uint8_t *from) {
    uint64_t bytes;
    memcpy(&bytes, from, WORD);
    return bytes;
}

static inline uint64_t repeated(uint8_t byte) {
    return byte * UINT64_C(0x0101010101010101);
}

static const uint8_t zeros[BITS];

#ifdef __SSE2__
static inline uint64_t differing_by_vector(const uint8_t *a, const uint8_t *b) {
    __m128i one = _mm_loadu_si128((const __m128i *)a), other = _mm_loadu_si128((const __m128i *)b);
    return _mm_movemask_epi8(_mm_cmpeq_epi8(one, other)) ^ 0xffff;
}
#endif

/* Bit x is set where a[x] is not b[x], of the first BITS among n. */
static inline uint64_t differing(const uint8_t *a, const uint8_t *b, Py_ssize_t n) {
    uint64_t found = 0;
    Py_ssize_t x = 0;
#ifdef __SSE2__
    if (n >= BITS) {
        for (int i = 0; i < BITS; i += 16) found |= differing_by_vector(a + i, b + i) << i;
        return found;
    }
    for (; x + 16 <= n; x += 16) found |= differing_by_vector(a + x, b + x) << x;
#elif LITTLE
    for (n = n < BITS ? n : BITS; x + WORD <= n; x += WORD) {
        uint64_t value = word(a + x) ^ word(b + x), low = repeated(0x7f);
        uint64_t ones = ((((value & low) + low) | value) >> 7) & repeated(1);
        found |= (ones * UINT64_C(0x0102040810204080)) >> 56 << x;
    }
#endif
    for (; x < n && x < BITS; x++) found |= (uint64_t)(a[x] != b[x]) << x;
    return found;
}

/* Writes `base` + the number of each bit that is set, and up to WORD others: a loop of so many steps as
   there are bits would be mispredicted. */
static inline uint32_t *list_bits(uint64_t bits, uint32_t base, uint32_t *to) {
    uint32_t *end = to + __builtin_popcountll(bits);
    do {
        for (int i = 0; i < WORD; i++, bits &= bits - 1)
            *to++ = base + __builtin_ctzll(bits | UINT64_C(1) << (BITS - 1));
    } while (bits);
    return end;
}

/* Memory for a row. */
typedef struct {
    uint64_t *stops; /* bit x is set where a prediction is wrong, or the row above changes */
    uint32_t *wrong; /* where predictions are wrong */
} room;

/* Undoes Paeth's filter. Where the prediction is right, it is the pixel above after equal pixels to the
   left, and the one to the left below equal pixels. So a row is the one above but for stretches that
   begin where a prediction is wrong. Most have one value up to the next stop, and end with it: these are
   without branches, as label maps change at random. */
FAST static void unfilter_paeth(const uint8_t *from, const uint8_t *above, uint8_t *to,
                                Py_ssize_t width, const room *room) {
    uint64_t *stops = room->stops, carry = 0;
    uint32_t *wrong = room->wrong, end = width;
    memcpy(to, above, width);
    for (Py_ssize_t base = 0; base < width; base += BITS) {
        uint64_t begins = differing(from + base, zeros, width - base);
        uint64_t changes = differing(above + base, above + base + 1, width - base - 1);
        *stops++ = begins | changes << 1 | carry;
        carry = changes >> (BITS - 1);
        wrong = list_bits(begins, base, wrong);
    }
    *stops = 0;
    *wrong = end;
    wrong = room->wrong;
    for (uint32_t x; (x = *wrong) < end; wrong++) {
        const uint64_t *here = room->stops + x / BITS;
        uint64_t later = here[0] >> x % BITS >> 1 | here[1] << (BITS - 1 - x % BITS);
        uint32_t n = __builtin_ctzll(later | UINT64_C(1) << (BITS - 1));
        uint8_t corner = above[x], left = to[x] = from[x] + corner;
        x++;
        if (LITTLE && n < WORD && x + WORD <= end) {
            uint64_t rest = ~UINT64_C(0) << 8 * n;
            uint64_t made = (repeated(left) & ~rest) | (word(above + x) & rest);
            memcpy(to + x, &made, WORD);
            x += n;
            uint8_t over = above[x];
            to[x] = left = from[x] + paeth(left, over, corner);
            corner = over;
            wrong += wrong[1] == x;
            x++;
            if (left == corner) continue;
        }
        for (; left != corner && x < end; x++) {
            uint8_t over = above[x];
            to[x] = left = from[x] + paeth(left, over, corner);
            corner = over;
        }
        while (wrong[1] < x) wrong++;
    }
}

/* Undoes the filter that adds the pixel to the left: sums within words, then of words. */
static void unfilter_left(const uint8_t *from, uint8_t *to, Py_ssize_t width) {
    uint8_t left = 0;
    Py_ssize_t x = 0;
#if LITTLE
    for (; x + 16 <= width; x += 16) {
        words sums;
        memcpy(&sums, from + x, sizeof sums);
        sums = (words)((bytes)sums + (bytes)(sums << 8));
        sums = (words)((bytes)sums + (bytes)(sums << 16));
        sums = (words)((bytes)sums + (bytes)(sums << 32));
        uint8_t first = left + (sums[0] >> 56);
        words before = {repeated(left), repeated(first)};
        left = first + (sums[1] >> 56);
        sums = (words)((bytes)sums + (bytes)before);
        memcpy(to + x, &sums, sizeof sums);
    }
#endif
    for (; x < width; x++) to[x] = left = from[x] + left;
}

/* Undoes the filter of a row of bytes; `above` is the row before it, zeros for the first. 0 if there
   is no such filter. */
static int unfilter_row(int filter, const uint8_t *from, const uint8_t *above, uint8_t *to,
                        Py_ssize_t width, const room *room) {
    uint8_t left = 0;
    if (filter == 0) {
        memcpy(to, from, width);
    } else if (filter == 1) {
        unfilter_left(from, to, width);
    } else if (filter == 2) {
        for (Py_ssize_t x = 0; x < width; x++) to[x] = from[x] + above[x];
    } else if (filter == 3) {
        for (Py_ssize_t x = 0; x < width; x++) to[x] = left = from[x] + (left + above[x]) / 2;
    } else if (filter == 4) {
        unfilter_paeth(from, above, to, width, room);
    }
    return filter >= 0 && filter <= 4;
}

/* Gets contiguous buffers of bytes; else sets an exception and returns 0. */
static int get(PyObject *first, Py_buffer *a, PyObject *second, Py_buffer *b, int flags) {
    if (PyObject_GetBuffer(first, a, PyBUF_ND)) return 0;
    if (PyObject_GetBuffer(second, b, PyBUF_ND | flags)) {
        PyBuffer_Release(a);
        return 0;
    }
    if (a->itemsize == 1 && b->itemsize == 1) return 1;
    PyBuffer_Release(a);
    PyBuffer_Release(b);
    PyErr_SetString(PyExc_ValueError, "not two arrays of bytes");
    return 0;
}

static PyObject *py_unfilter(PyObject *self, PyObject *args) {
    Py_buffer data, out;
    PyObject *from, *to;
    if (!PyArg_ParseTuple(args, "OO", &from, &to) || !get(from, &data, to, &out, PyBUF_WRITABLE))
        return NULL;
    const char *why = NULL;
    if (out.ndim != 2 || out.shape[1] > MOST || data.len != out.shape[0] * (out.shape[1] + 1)) {
        why = "not [H, W + 1] bytes for [H, W]";
    } else {
        Py_ssize_t height = out.shape[0], width = out.shape[1];
        uint8_t *first = calloc(width + 1, 1);
        uint64_t *stops = malloc((width / BITS + 2) * sizeof *stops);
        uint32_t *wrong = malloc((width + WORD + 1) * sizeof *wrong);
        int ok = first && stops && wrong;
        if (!ok) why = "out of memory";
        Py_BEGIN_ALLOW_THREADS;
        const room room = {stops, wrong};
        const uint8_t *row = data.buf, *above = first;
        uint8_t *place = out.buf;
        for (Py_ssize_t y = 0; ok && y < height; y++) {
            ok = unfilter_row(row[0], row + 1, above, place, width, &room);
            above = place;
            row += width + 1;
            place += width;
        }
        Py_END_ALLOW_THREADS;
        if (!ok && !why) why = "no such filter";
        free(first);
        free(stops);
        free(wrong);
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    if (why) {
        PyErr_SetString(PyExc_ValueError, why);
        return NULL;
    }
    Py_RETURN_NONE;
}

static void add_up(int64_t counts[TABLES][256], int64_t *total) {
    for (int v = 0; v < 256; v++) {
        total[v] = 0;
        for (int k = 0; k < TABLES; k++) total[v] += counts[k][v];
    }
}

/* Counts values; runs by words. */
static void count(const uint8_t *values, int64_t *total, Py_ssize_t n) {
    int64_t counts[TABLES][256] = {{0}};
    Py_ssize_t i = 0;
    for (; i + WORD <= n; i += WORD) {
        if (word(values + i) == repeated(values[i]))
            counts[0][values[i]] += WORD;
        else
            for (int k = 0; k < WORD; k++) counts[k % TABLES][values[i + k]]++;
    }
    for (; i < n; i++) counts[0][values[i]]++;
    add_up(counts, total);
}

static PyObject *py_count(PyObject *self, PyObject *args) {
    Py_buffer values, out;
    PyObject *from, *to;
    if (!PyArg_ParseTuple(args, "OO", &from, &to)) return NULL;
    if (PyObject_GetBuffer(from, &values, PyBUF_ND)) return NULL;
    if (PyObject_GetBuffer(to, &out, PyBUF_ND | PyBUF_WRITABLE)) {
        PyBuffer_Release(&values);
        return NULL;
    }
    int ok = values.itemsize == 1 && out.itemsize == 8 && out.len == 256 * 8;
    if (ok) {
        Py_BEGIN_ALLOW_THREADS;
        count(values.buf, out.buf, values.len);
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_SetString(PyExc_ValueError, "not bytes, and 256 numbers of 64 bits");
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

/* A table that adds `by` to values with (uint8_t)(value - start) <= most and maps others to FILL, or to
   -1 unless (uint8_t)(value - first) <= last. */
typedef struct {
    uint8_t by, start, most, first, last;
} shift;

/* Whether a table is such a one, as the tables of most data sets are. */
static int find_shift(const int32_t *table, shift *found) {
    int start = 0, end, valid = 0, first = 0;
    while (start < 256 && !(table[start] >= 0 && table[start] < FILL)) start++;
    if (start == 256) return 0;
    for (end = start + 1; end < 256 && table[end] == table[end - 1] + 1 && table[end] < FILL;) end++;
    for (int v = 0; v < 256; v++) {
        if (table[v] < 0) continue;
        valid++;
        if (table[(v + 255) % 256] < 0) first = v;
    }
    *found = (shift){table[start] - start, start, end - 1 - start, first, valid - 1};
    for (int v = 0; v < 256; v++) {
        int moves = (uint8_t)(v - start) <= found->most;
        if ((uint8_t)(v - first) > found->last) continue; /* `valid` others have to be labels */
        if (table[v] != (moves ? (uint8_t)(v + found->by) : FILL)) return 0;
    }
    return 1;
}

/* Maps n values by such a table; whether all are mapped. */
FAST static int look_up_shifted(const uint8_t *restrict value, uint8_t *restrict place, shift table,
                                Py_ssize_t n) {
    uint8_t most = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        uint8_t v = value[i], order = v - table.first;
        place[i] = (uint8_t)(v - table.start) <= table.most ? v + table.by : FILL;
        most = order > most ? order : most;
    }
    return most <= table.last;
}

/* Maps n values by a table; whether all entries that occur are bytes. */
static int look_up(const uint8_t *restrict value, uint8_t *restrict place,
                   const int32_t *restrict table, Py_ssize_t n) {
    shift found;
    if (find_shift(table, &found)) return look_up_shifted(value, place, found, n);
    uint32_t all = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t entry = table[value[i]];
        all |= entry;
        place[i] = entry;
    }
    return all <= UINT8_MAX;
}

static PyObject *py_look_up(PyObject *self, PyObject *args) {
    Py_buffer values, out, table;
    PyObject *from, *to;
    if (!PyArg_ParseTuple(args, "OOy*", &from, &to, &table)) return NULL;
    if (!get(from, &values, to, &out, PyBUF_WRITABLE)) {
        PyBuffer_Release(&table);
        return NULL;
    }
    int valid = 0, ok = table.len == 256 * 4 && values.len == out.len;
    if (ok) {
        Py_BEGIN_ALLOW_THREADS;
        valid = look_up(values.buf, out.buf, table.buf, out.len);
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_SetString(PyExc_ValueError, "not two arrays of one size, and a table of 256 numbers");
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    PyBuffer_Release(&table);
    return ok ? PyBool_FromLong(valid) : NULL;
}

/* What a view does along an axis: it resizes `length` pixels from `start` on to `whole`, of which the
   output shows those from `offset` on. */
typedef struct {
    Py_ssize_t start, length, whole, offset;
} axis;

/* Whether it stays within `size` pixels. */
static int is_within(const axis *a, Py_ssize_t size) {
    return a->start >= 0 && a->length > 0 && a->length <= size && a->start <= size - a->length &&
           a->whole > 0;
}

/* The pixels under the centres of n output pixels, those from *first to *last; the others are padding.
   As Geometry.nearest, to the bit: in the same doubles. */
static void nearest(const axis *a, Py_ssize_t n, int flip, Py_ssize_t *at, Py_ssize_t *first,
                    Py_ssize_t *last) {
    *first = n;
    *last = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        double place = (flip ? n - (i + 0.5) : i + 0.5) + a->offset;
        if (!(place >= 0 && place < a->whole)) continue;
        Py_ssize_t k = place * a->length / a->whole;
        at[i] = a->start + (k < a->length ? k : a->length - 1);
        if (*last == 0) *first = i;
        *last = i + 1;
    }
}

/* Which of 2 BLOCK bytes from `start` on become BLOCK output pixels: indices in either half, 128 where
   the pixel is in the other one. */
typedef struct {
    Py_ssize_t start;
    uint8_t low[BLOCK], high[BLOCK];
} block;

/* The pixels that a view takes: rows from `top` to `bottom` of the output have those of row[y], columns
   from `left` to `right` those of column[x]; the others are padding. `begin` has room for one more. */
typedef struct {
    Py_ssize_t height, width, top, bottom, left, right;
    Py_ssize_t *row, *column, *begin;
    block *blocks; /* of the columns, the last BLOCK in any case; NULL where they are too far apart */
} places;

/* Makes blocks of n columns of `length`, if they can be used. */
static void make_blocks(places *p, Py_ssize_t length, Py_ssize_t n) {
    const Py_ssize_t *column = p->column + p->left;
    if (!HAS_SHUFFLES || n < BLOCK || length < 2 * BLOCK) return;
    block *made = malloc((n + BLOCK - 1) / BLOCK * sizeof *made);
    for (Py_ssize_t i = 0, k = 0; made && i < n; i += BLOCK, k++) {
        const Py_ssize_t *at = column + (i + BLOCK < n ? i : n - BLOCK);
        Py_ssize_t least = at[0] < at[BLOCK - 1] ? at[0] : at[BLOCK - 1];
        made[k].start = least < length - 2 * BLOCK ? least : length - 2 * BLOCK;
        for (int j = 0; j < BLOCK; j++) {
            Py_ssize_t apart = at[j] - made[k].start;
            if (apart >= 2 * BLOCK) {
                free(made);
                return;
            }
            made[k].low[j] = apart < BLOCK ? apart : 128;
            made[k].high[j] = apart < BLOCK ? 128 : apart - BLOCK;
        }
    }
    p->blocks = made;
}

/* Finds the pixels that a view [height, width] takes; 0 if out of memory. */
static int find_places(places *p, const axis *axes, Py_ssize_t height, Py_ssize_t width, int flip) {
    *p = (places){.height = height, .width = width};
    p->row = malloc((height + 2 * width + 1) * sizeof *p->row);
    if (!p->row) return 0;
    p->column = p->row + height;
    p->begin = p->column + width;
    nearest(&axes[0], height, 0, p->row, &p->top, &p->bottom);
    nearest(&axes[1], width, flip, p->column, &p->left, &p->right);
    if (p->left >= p->right || p->top >= p->bottom) p->top = p->bottom = p->left = p->right = 0;
    return 1;
}

static void free_places(places *p) {
    free(p->row);
    free(p->blocks);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("ssse3"))) static void take_blocks(const uint8_t *line, const block *blocks,
                                                         uint8_t *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i += BLOCK, blocks++) {
        const __m128i *from = (const __m128i *)(line + blocks->start);
        __m128i low = _mm_loadu_si128((const __m128i *)blocks->low);
        __m128i high = _mm_loadu_si128((const __m128i *)blocks->high);
        low = _mm_shuffle_epi8(_mm_loadu_si128(from), low);
        high = _mm_shuffle_epi8(_mm_loadu_si128(from + 1), high);
        Py_ssize_t place = i + BLOCK < n ? i : n - BLOCK;
        _mm_storeu_si128((__m128i *)(to + place), _mm_or_si128(low, high));
    }
}
#else
static void take_blocks(const uint8_t *line, const block *blocks, uint8_t *to, Py_ssize_t n) {}
#endif

/* Takes the pixels of a row. */
static void take(const uint8_t *line, const places *p, uint8_t *to) {
    Py_ssize_t n = p->right - p->left;
    if (p->blocks) {
        take_blocks(line, p->blocks, to, n);
    } else {
        const Py_ssize_t *column = p->column + p->left;
        for (Py_ssize_t i = 0; i < n; i++) to[i] = line[column[i]];
    }
}

/* Takes the pixels of a view of values that are `length` to a row. */
static void view(const uint8_t *values, Py_ssize_t length, uint8_t *out, places *p, int fill) {
    Py_ssize_t w = p->width;
    make_blocks(p, length, p->right - p->left);
    memset(out, fill, p->top * w);
    for (Py_ssize_t y = p->top; y < p->bottom; y++) {
        uint8_t *place = out + y * w;
        if (y > p->top && p->row[y] == p->row[y - 1]) {
            memcpy(place, place - w, w);
        } else {
            memset(place, fill, p->left);
            take(values + p->row[y] * length, p, place + p->left);
            memset(place + p->right, fill, w - p->right);
        }
    }
    memset(out + p->bottom * w, fill, (p->height - p->bottom) * w);
}

/* Whether values that `view` takes are labels of several classes, none of which covers `most` of them.
   Each pixel of the image is looked up once, whatever the number of output pixels that show it; those
   that can't change the result are not. */
static int is_mixed(const uint8_t *values, Py_ssize_t length, places *p, double most) {
    int64_t counts[TABLES][256] = {{0}};
    Py_ssize_t *column = p->column, *begin = p->begin, n = 0, rows = 0;
    for (Py_ssize_t x = p->left; x < p->right; x++) {
        if (n && column[x] == column[n - 1]) continue;
        column[n] = column[x];
        begin[n++] = x;
    }
    begin[n] = p->right;
    for (Py_ssize_t i = 0; i < n; i++) begin[i] = begin[i + 1] - begin[i];
    int64_t total[256], largest, all, rest;
    for (Py_ssize_t y = p->top, k = 1; y < p->bottom; y += rows, k++) {
        for (rows = 1; y + rows < p->bottom && p->row[y + rows] == p->row[y];) rows++;
        const uint8_t *line = values + p->row[y] * length;
        Py_ssize_t i = 0;
        for (; i + TABLES <= n; i += TABLES)
            for (int j = 0; j < TABLES; j++)
                counts[j][line[column[i + j]]] += rows * begin[i + j];
        for (; i < n; i++) counts[0][line[column[i]]] += rows * begin[i];
        rest = (p->bottom - y - rows) * (p->right - p->left);
        if (k % CHECKED && rest) continue;
        add_up(counts, total);
        largest = all = 0;
        for (int v = 0; v < FILL; v++) {
            all += total[v];
            largest = total[v] > largest ? total[v] : largest;
        }
        if (largest + rest < most * (all + rest)) return 1; /* even if the rest is of that class */
    }
    return 0;
}

/* Parses the part (top, left, height, width) of an image [h, w] and the (height, width) that it is
   resized to, and the (y, x) from which on an output shows it. */
#define AXES "(nnnn)(nn)(nn)"
#define AXES_OF(a)                                                                            \
    &a[0].start, &a[1].start, &a[0].length, &a[1].length, &a[0].whole, &a[1].whole,           \
        &a[0].offset, &a[1].offset

static PyObject *py_view(PyObject *self, PyObject *args) {
    Py_buffer values, out;
    PyObject *from, *to;
    axis axes[2];
    int flip;
    unsigned char fill;
    if (!PyArg_ParseTuple(args, "OO" AXES "pb", &from, &to, AXES_OF(axes), &flip, &fill) ||
        !get(from, &values, to, &out, PyBUF_WRITABLE))
        return NULL;
    const char *why = NULL;
    if (values.ndim != 2 || out.ndim != 2 || !is_within(&axes[0], values.shape[0]) ||
        !is_within(&axes[1], values.shape[1])) {
        why = "not a part of [H, W] for [h, w]";
    } else {
        places found;
        Py_BEGIN_ALLOW_THREADS;
        if (find_places(&found, axes, out.shape[0], out.shape[1], flip))
            view(values.buf, values.shape[1], out.buf, &found, fill);
        else
            why = "out of memory";
        free_places(&found);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    if (why) {
        PyErr_SetString(PyExc_ValueError, why);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *py_is_mixed(PyObject *self, PyObject *args) {
    Py_buffer values;
    PyObject *from;
    axis axes[2];
    Py_ssize_t height, width;
    double most;
    if (!PyArg_ParseTuple(args, "Od(nn)" AXES, &from, &most, &height, &width, AXES_OF(axes)) ||
        PyObject_GetBuffer(from, &values, PyBUF_ND))
        return NULL;
    int mixed = 0;
    const char *why = NULL;
    if (values.ndim != 2 || values.itemsize != 1 || height < 0 || width < 0 || height > MOST ||
        width > MOST || !is_within(&axes[0], values.shape[0]) ||
        !is_within(&axes[1], values.shape[1])) {
        why = "not a part of [H, W] for [h, w]";
    } else {
        places found;
        Py_BEGIN_ALLOW_THREADS;
        if (find_places(&found, axes, height, width, 0))
            mixed = is_mixed(values.buf, values.shape[1], &found, most);
        else
            why = "out of memory";
        free_places(&found);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&values);
    if (why) {
        PyErr_SetString(PyExc_ValueError, why);
        return NULL;
    }
    return PyBool_FromLong(mixed);
}

static PyMethodDef methods[] = {
    {"unfilter", py_unfilter, METH_VARARGS,
     "unfilter(bytes [H, W + 1], each row after the number of its filter, out uint8 [H, W])"},
    {"count", py_count, METH_VARARGS, "count(uint8, out int64 [256])"},
    {"look_up", py_look_up, METH_VARARGS,
     "look_up(uint8, out uint8 of that size, table int32 [256]) -> whether all are bytes"},
    {"view", py_view, METH_VARARGS,
     "view(uint8 [H, W], out uint8 [h, w], (top, left, height, width), (height, width) it is resized "
     "to, (y, x) offset, flip, fill), see geometry.Geometry"},
    {"is_mixed", py_is_mixed, METH_VARARGS,
     "is_mixed(uint8 [H, W], most, (h, w), window, resized, offset) -> whether `view` shows several "
     "classes, none of which covers `most` of its labelled pixels"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_labels", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__labels(void) {
    return PyModule_Create(&module);
}
