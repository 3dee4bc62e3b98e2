/* Decodes and resizes windows of JPEGs: only the rows, columns and scale that a crop needs.

   libjpeg-turbo does all but the entropy decoding of the usual files: Huffman codes, either sequential
   in one scan or progressive.
   Entropy decoding takes four fifths of the time for a photograph of ImageNet's size. Here
   - bytes are unstuffed first, so that one 8-byte load fills the bit buffer;
   - one look-up by LOOK bits gives a coefficient's run and length, and its value but for low bits;
   - blocks of which no pixel is needed are skipped by look-ups that take several coefficients.
   A window is resized while it is decoded. Blocks and rows between the pixels that its filter takes
   are neither transformed nor upsampled.
   Data that seem damaged are an error; the caller then decodes the file by Pillow.

   This needs members of private structs of libjpeg. entropy.py checks that it gives libjpeg's own
   bits, and else has `view` leave all to libjpeg.

   `view` and `resize` release the GIL. All functions raise ValueError. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#define LOOK 10                 /* bits of the look-up of one coefficient */
#define PAIR 11                 /* bits of the look-up of the length of two */
#define MOST 18                 /* bits of a symbol that is looked up: three are in 56 bits */
#define SKIP 10                 /* bits of the look-up that skips as many as fit */
#define TAIL 1024               /* most entries of the look-up of longer codes, by 16 bits */
#define TABLES 16               /* kept per thread; one image has 8 at most */
#define PADDING 4096            /* zero bytes; an MCU is at most 10 blocks of 64 x 31 bits */
#define CUT 0x1p-10f            /* added before truncation: 255 less a rounding error stays 255 */
#define MOST_KEPT (1 << 24)     /* bytes of each kind kept per thread */
#define ROOM (1 << 18)          /* bytes of decoded rows at least, so that few are moved */
#define MAX_PIXELS 178956970    /* Pillow's limit for decompression bombs */
#define MAX_WORK 0x1p32         /* pixels times scans: half a minute; a photograph has 10 scans */

#if defined(__x86_64__) && defined(__GLIBC__)
#define FAST __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define FAST
#endif

#define ALWAYS_INLINE __attribute__((always_inline)) static inline

#ifdef __x86_64__
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define INLINE_AVX2 AVX2 ALWAYS_INLINE
#endif

#define TEXT(x) #x
#define QUOTE(x) TEXT(x)

typedef float pixel __attribute__((vector_size(16)));
typedef int32_t integers __attribute__((vector_size(16)));
typedef uint8_t bytes __attribute__((vector_size(16)));

/* ---------------------------------------------------------------- entropy decoding */

/* The first members of parts of libjpeg, unchanged from version 6b on. */
typedef struct {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
    boolean insufficient_data;
} entropy_decoder;

typedef void (*inverse_dct)(j_decompress_ptr, jpeg_component_info *, JCOEFPTR, JSAMPARRAY,
                            JDIMENSION);
typedef struct {
    void (*start_pass)(j_decompress_ptr);
    inverse_dct of_component[MAX_COMPONENTS];
} inverse_dcts;

/* Upsamples, and converts colours. */
typedef void (*upsampler)(j_decompress_ptr, JSAMPIMAGE, JDIMENSION *, JDIMENSION, JSAMPARRAY,
                          JDIMENSION *, JDIMENSION);
typedef struct {
    void (*start_pass)(j_decompress_ptr, int);
    upsampler upsample;
} post_controller;

typedef struct {
    uint8_t length;  /* of the code; 0: there is no such code */
    uint8_t size;    /* bits of the value after it */
    uint8_t run;     /* zeros before it; 64 at the end of the block. In a progressive file as coded */
} code;

/* What LOOK bits tell of a code and its value. All members are 0 if they do not hold the code and the
   sign, or if there are more than MOST bits. */
typedef struct {
    int16_t offset;  /* the value less the bits of code and value as a number, modulo 2^16 */
    uint8_t run;     /* as above */
    uint8_t length;  /* number of these bits */
} symbol;

typedef struct {
    code codes[1 << LOOK], tail[TAIL];
    unsigned tail_from;        /* the first 16 bits that begin with a code longer than LOOK */
    symbol look[1 << LOOK];
    /* for AC coefficients only: */
    uint8_t pair[1 << PAIR];   /* length of the first symbol, or, + TWO, of the first two */
    uint16_t skip[1 << SKIP];  /* length, 6 bits, of all whose codes fit, and the number of
                                  coefficients that they fill, + 64 if the last one ends the block */
    /* source: number of codes of each length, and their values */
    uint8_t lengths[17], values[256];
    int kind;
    uint64_t used;
} table;

enum { DC, AC, PROGRESSIVE };  /* kinds of tables: the last is of AC coefficients, too */

#define TWO 0x80

/* Kept per thread from image to image: mapped memory, and tables that many files share. */
typedef struct {
    table tables[TABLES];
    uint64_t used;  /* clock of table uses, to find the least recently used one */
    uint8_t *data, *rows;
    size_t data_size, rows_size;
} scratch;

static pthread_key_t scratch_of_thread;

static scratch *get_scratch(void) {
    scratch *s = pthread_getspecific(scratch_of_thread);
    if (!s && (s = calloc(1, sizeof *s))) pthread_setspecific(scratch_of_thread, s);
    return s;
}

static void free_scratch(void *kept) {
    scratch *s = kept;
    free(s->data);
    free(s->rows);
    free(s);
}

/* Makes room for `size` bytes in `*kept`, whose contents are lost; NULL without memory. */
static uint8_t *reserve(uint8_t **kept, size_t *room, size_t size) {
    if (*room < size) {
        free(*kept);
        *kept = malloc(size);
        *room = *kept ? size : 0;
    }
    return *kept;
}

/* Frees memory that only a very large image needs. */
static void trim(uint8_t **kept, size_t *room) {
    if (*room <= MOST_KEPT) return;
    free(*kept);
    *kept = NULL;
    *room = 0;
}

typedef struct {
    uint64_t buffer;      /* the next bits, first at the top */
    const uint8_t *next;  /* the next bytes */
    int count;            /* of bits in the buffer */
    int wrong;            /* whether a code was not in the table */
} bits;

typedef struct {
    int y, x, height, width;
} window;

/* The part of a window to resize, in fractional pixels of the window. */
typedef struct {
    double y, x, height, width;
} part;

typedef struct {
    int *start;      /* [size]: the first pixel with a weight; ascending */
    float *weights;  /* [size, taps] */
    int size, taps;
    float *pairs;    /* [size / 4, 2, taps, 8]: weights of two outputs, each of them four times; NULL
                        if `add_quads` is not to be used */
} filter;

/* Filters along both axes, and a row of RGBX floats between them. */
typedef struct {
    filter across, down;
    float *line;
} resizer;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jmp_buf escape;
    char message[JMSG_LENGTH_MAX];
    uint8_t *data;                  /* entropy-coded data, unstuffed, and zeros */
    size_t *segments;               /* start of each restart interval in it, and the end */
    size_t segment_count, segment;
    const uint8_t *end;             /* of this restart interval */
    bits bits;
    const table *dc[MAX_COMPS_IN_SCAN], *ac[MAX_COMPS_IN_SCAN];
    unsigned predictions[MAX_COMPS_IN_SCAN];  /* damaged data may wrap them around */
    unsigned restart, column, row;      /* of the next MCU */
    int left_to_libjpeg;                /* whether it decodes this scan and all later ones of it */
    size_t mcu;                         /* number of the next one in a progressive scan */
    unsigned blanks;                    /* blocks to come in it without new coefficients */
    uint64_t *nonzero[MAX_COMPONENTS];  /* which coefficients of each block are not 0, by place */
    void (*start_pass)(j_decompress_ptr);
    struct jpeg_progress_mgr progress;
    unsigned first_column, last_column; /* of MCUs in the window */
    JCOEFPTR blocks;                /* of the MCU that was decoded last */
    unsigned wanted;                /* of these, by bit */
    int discard;                    /* whether rows that are read are wanted by nobody */
    inverse_dct inverse_dct[MAX_COMPONENTS];
    upsampler upsample;
    uint16_t *in_column, *in_row;   /* blocks that are wanted of each column and row of MCUs */
    scratch *scratch;
    resizer resizer;
    uint8_t *rows;                  /* RGBX [room, stride]: rows from first_row on, before next_row */
    size_t stride;                  /* bytes */
    int room, first_row, next_row;
} decoder;

/* Zigzag order to natural order; runs past the end of a block stay inside of the block. */
static const uint8_t natural[64 + 2 * 65] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    [64 ... 64 + 2 * 65 - 1] = 63,
};

static void fail(decoder *d, const char *message) {
    snprintf(d->message, sizeof d->message, "%s", message);
    longjmp(d->escape, 1);
}

static inline void fill(bits *b) {
    uint64_t word;
    memcpy(&word, b->next, 8);
    b->buffer |= __builtin_bswap64(word) >> b->count;
    b->next += (63 - b->count) >> 3;
    b->count |= 56;
}

static inline void drop(bits *b, int count) {
    b->buffer <<= count & 63;
    b->count -= count & 63;
}

/* Value of the first `size` < 16 bits (ITU T.81 F.2.2.1): negative if the first of them is 0. */
static inline int value_of(uint64_t buffer, int size) {
    int negative = (int)(~buffer >> 63);
    return (int)(buffer >> 1 >> (63 - size)) + ((1 - (1 << size)) & -negative);
}

static inline code find(const table *t, uint64_t buffer) {
    unsigned top = buffer >> 48;
    return top < t->tail_from ? t->codes[top >> (16 - LOOK)] : t->tail[top - t->tail_from];
}

/* A decoded coefficient, and the zeros before it. */
typedef struct {
    int16_t value;
    uint8_t run;
} coefficient;

/* Decodes the next code, of any length, and its value. */
static inline coefficient next_coefficient(bits *b, const table *t) {
    fill(b);
    code c = find(t, b->buffer);
    b->wrong |= !c.length;
    drop(b, c.length);
    coefficient next = {value_of(b->buffer, c.size), c.run};
    drop(b, c.size);
    return next;
}

/* Makes look-ups of Huffman codes (ITU T.81 annex C); values of AC codes are (run, size) pairs.
   Returns 0 if the codes are invalid, or too many are long. */
static int make_codes(table *t) {
    unsigned next = 0, index = 0; /* in 16 bits */
    t->tail_from = 1 << 16;
    for (int length = 1; length <= 16; length++) {
        for (int i = 0; i < t->lengths[length]; i++, index++) {
            int value = t->values[index & 255];
            code c = {length, value, 0};
            if (t->kind != DC) {
                c.size = value & 15;
                c.run = t->kind == AC && !c.size && value != 0xf0 ? 64 : value >> 4;
            }
            if (index > 255 || next >= 1 << 16 || c.size > (t->kind == DC ? 11 : 15)) return 0;
            unsigned end = next + (1 << (16 - length));
            if (end > 1 << 16) return 0;
            if (length > LOOK && t->tail_from > next) t->tail_from = next;
            if (end - t->tail_from > TAIL && length > LOOK) return 0;
            if (length > LOOK)
                for (; next < end; next++) t->tail[next - t->tail_from] = c;
            else
                for (; next < end; next += 1 << (16 - LOOK)) t->codes[next >> (16 - LOOK)] = c;
        }
    }
    return (1 << 16) - t->tail_from <= TAIL;
}

/* Makes the look-up of one symbol by the next bits in the file. */
static void make_symbols(table *t) {
    for (int i = 0; i < 1 << LOOK; i++) {
        code c = t->codes[i];
        int length = c.length + c.size, after = LOOK - c.length;  /* bits known of the value */
        if (!c.length || length > MOST || (c.size && !after)) continue;
        if (t->kind == PROGRESSIVE && !c.size) continue;
        int offset = -(i >> after << c.size);
        if (c.size && !(i >> (after - 1) & 1)) offset += 1 - (1 << c.size);  /* it is negative */
        t->look[i] = (symbol){offset, c.run, length};
    }
}

/* Makes look-ups of the lengths of several symbols of AC coefficients. */
static void make_lengths(table *t) {
    for (unsigned i = 0; i < 1 << PAIR; i++) {
        symbol one = t->look[i >> (PAIR - LOOK)], two = {0};
        if (one.length < PAIR) two = t->look[(i << one.length & ((1 << PAIR) - 1)) >> (PAIR - LOOK)];
        int both = one.length + two.length;
        t->pair[i] = one.run < 64 && two.length && both <= PAIR ? both | TWO : one.length;
    }
    for (unsigned i = 0; i < 1 << SKIP; i++) {
        int used = 0, advance = 0;
        while (used < SKIP && advance < 64) {
            code c = t->codes[(i << used & ((1 << SKIP) - 1)) >> (SKIP - LOOK)];
            int more = c.run == 64 ? 64 : c.run + 1;
            if (!c.length || used + c.length > SKIP || used + c.length + c.size > MOST ||
                (more < 64 && advance + more > 63))
                break;
            used += c.length + c.size;
            advance += more;
        }
        t->skip[i] = advance << 6 | used;
    }
}

/* Look-ups of a Huffman table, kept or new; NULL if libjpeg must decode its scan. */
static const table *get_table(scratch *kept, const JHUFF_TBL *from, int kind) {
    table *t = kept->tables;
    if (!from) return NULL;
    for (int i = 0; i < TABLES; i++) {
        table *other = &kept->tables[i];
        if (other->used && other->kind == kind && !memcmp(other->lengths + 1, from->bits + 1, 16) &&
            !memcmp(other->values, from->huffval, 256)) {
            other->used = ++kept->used;
            return other;
        }
        if (other->used < t->used) t = other;
    }
    memset(t, 0, sizeof *t);
    memcpy(t->lengths, from->bits, 17);
    memcpy(t->values, from->huffval, 256);
    t->kind = kind;
    if (!make_codes(t)) return NULL;
    make_symbols(t);
    if (kind == AC) make_lengths(t);
    t->used = ++kept->used;
    return t;
}

/* Value of a symbol at the start of the buffer. */
static inline int16_t value_at(uint64_t buffer, symbol s) {
    return (int16_t)(buffer >> (-s.length & 63)) + s.offset;
}

/* A look-up waits for the length of the symbol before it, so the length of two symbols is looked up
   at once. The second is stored even if it is not consumed: it comes next, and is stored again at
   the same place. It is stored before the first, which may be the last of the block. After `fill`
   there are bits for three of these steps: 3 x MOST <= 56. */
static inline void decode_block(bits *b, const table *t, JCOEF *block) {
    for (size_t k = 1;;) {
        fill(b);
        for (int i = 0; i < 3; i++) {
            unsigned pair = t->pair[b->buffer >> (64 - PAIR)];
            symbol first = t->look[b->buffer >> (64 - LOOK)];
            if (__builtin_expect(!first.length, 0)) {
                coefficient next = next_coefficient(b, t);
                block[natural[k]] = 0; /* the symbol before may have left something there */
                k += next.run;
                block[natural[k]] = next.value;
                if (++k > 63) return;
                break;
            }
            uint64_t rest = b->buffer << first.length;
            symbol second = t->look[rest >> (64 - LOOK)];
            k += first.run;
            block[natural[k + 1 + second.run]] = value_at(rest, second);
            block[natural[k]] = value_at(b->buffer, first);
            if (++k > 63) {
                drop(b, first.length);
                return;
            }
            drop(b, pair);
            k += (second.run + 1u) & -(pair >> 7); /* no branch: it is unpredictable */
            if (k > 63) return;
        }
    }
}

static inline void skip_block(bits *b, const table *t) {
    for (int k = 1;;) {
        fill(b);
        for (int i = 0; i < 3; i++) {
            unsigned some = t->skip[b->buffer >> (64 - SKIP)];
            int length = some & 63, next = k + (some >> 6);
            if (__builtin_expect(length && next < 64, 1)) {
                drop(b, length);
                k = next;
            } else if (some >> 12 && next < 128) {
                drop(b, length);
                return;
            } else {
                k += next_coefficient(b, t).run + 1;
                if (k > 63) return;
                break;
            }
        }
    }
}

/* Decodes the difference of a DC coefficient to the one before it. */
static inline int decode_dc(bits *b, const table *t) {
    fill(b);
    symbol s = t->look[b->buffer >> (64 - LOOK)];
    if (__builtin_expect(!s.length, 0)) return next_coefficient(b, t).value;
    int value = value_at(b->buffer, s);
    drop(b, s.length);
    return value;
}

/* Begins the next restart interval, if the last one has ended. */
static inline void restart(decoder *d) {
    if (d->jpeg.restart_interval && d->restart == 0) {
        if (++d->segment >= d->segment_count) fail(d, "the image is truncated");
        d->bits = (bits){.next = d->data + d->segments[d->segment]};
        d->end = d->data + d->segments[d->segment + 1];
        d->restart = d->jpeg.restart_interval;
        d->blanks = 0;
        memset(d->predictions, 0, sizeof d->predictions);
    }
    d->restart--;
}

/* Stores where decoding goes on, or fails. */
static inline void advance(decoder *d, bits b) {
    d->bits = b;
    if (b.next - b.count / 8 > d->end) fail(d, "the image is truncated");
    if (b.wrong) fail(d, "no such Huffman code");
}

/* Replaces libjpeg's decode_mcu: decodes one MCU, or skips it if `blocks` is NULL. */
FAST static boolean decode_mcu(j_decompress_ptr jpeg, JBLOCKROW *blocks) {
    decoder *d = jpeg->client_data;
    restart(d);
    unsigned wanted = 0;  /* by bit of each block */
    if (blocks && d->column >= d->first_column && d->column <= d->last_column &&
        d->row < jpeg->MCU_rows_in_scan)
        wanted = d->in_column[d->column] & d->in_row[d->row];
    if (++d->column == jpeg->MCUs_per_row) {
        d->column = 0;
        d->row++;
    }
    d->wanted = wanted;
    if (blocks) d->blocks = blocks[0][0];
    bits b = d->bits;  /* a copy that stays in registers */
    for (int i = 0; i < jpeg->blocks_in_MCU; i++) {
        int place = jpeg->MCU_membership[i];
        d->predictions[place] += decode_dc(&b, d->dc[place]);
        if (wanted >> i & 1) {
            blocks[i][0][0] = d->predictions[place];
            decode_block(&b, d->ac[place], blocks[i][0]);
        } else {
            skip_block(&b, d->ac[place]);
        }
    }
    advance(d, b);
    return TRUE;
}

/* Replaces libjpeg's inverse DCTs: leaves out blocks that are not wanted. */
static void invert_wanted(j_decompress_ptr jpeg, jpeg_component_info *component, JCOEFPTR block,
                          JSAMPARRAY out, JDIMENSION column) {
    decoder *d = jpeg->client_data;
    if (d->wanted >> (block - d->blocks) / DCTSIZE2 & 1)
        d->inverse_dct[component->component_index](jpeg, component, block, out, column);
}

/* Replaces libjpeg's upsampling: leaves out groups of rows, of the height of a pixel of the coarsest
   component, that are not wanted. libjpeg keeps no account of them but in these arguments. */
static void upsample_wanted(j_decompress_ptr jpeg, JSAMPIMAGE in, JDIMENSION *group,
                            JDIMENSION groups, JSAMPARRAY out, JDIMENSION *row, JDIMENSION rows) {
    decoder *d = jpeg->client_data;
    JDIMENSION height = jpeg->max_v_samp_factor;
    if (!d->discard || (jpeg->output_scanline + *row) % height || *row + height > rows) {
        d->upsample(jpeg, in, group, groups, out, row, rows);
    } else {
        *row += height;
        ++*group;
    }
}

/* Copies bytes up to the first 0xff, or to the end; returns their number. The fast version may write
   31 bytes more. */
static size_t copy_plain(uint8_t *to, const uint8_t *from, const uint8_t *end) {
    const uint8_t *marker = memchr(from, 0xff, end - from);
    size_t count = (marker ? marker : end) - from;
    memcpy(to, from, count);
    return count;
}

#ifdef AVX2
AVX2 static size_t copy_plain_fast(uint8_t *to, const uint8_t *from, const uint8_t *end) {
    const __m256i ones = _mm256_set1_epi8(-1);
    size_t count = 0, size = end - from;
    for (; size - count >= 32; count += 32) {
        __m256i some = _mm256_loadu_si256((const __m256i *)(from + count));
        _mm256_storeu_si256((__m256i *)(to + count), some);
        unsigned found = _mm256_movemask_epi8(_mm256_cmpeq_epi8(some, ones));
        if (found) return count + __builtin_ctz(found);
    }
    return count + copy_plain(to + count, from + count, end);
}

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2");
}
#else
#define copy_plain_fast copy_plain
#define has_avx2() 0
#endif

/* Copies the entropy-coded data up to the next marker without stuffed bytes; records restarts. Their
   numbers are 0 to 7 in turn. Returns the marker, or the end. */
static const uint8_t *unstuff(decoder *d) {
    const uint8_t *from = d->jpeg.src->next_input_byte, *end = from + d->jpeg.src->bytes_in_buffer;
    const uint8_t *stop = end;
    size_t restarts = 1;
    if (d->jpeg.restart_interval)
        restarts += (size_t)d->jpeg.MCUs_per_row * d->jpeg.MCU_rows_in_scan / d->jpeg.restart_interval;
    d->data = reserve(&d->scratch->data, &d->scratch->data_size, end - from + PADDING);
    free(d->segments);
    d->segments = malloc((restarts + 1) * sizeof *d->segments);
    if (!d->data || !d->segments) fail(d, "out of memory");
    uint8_t *to = d->data;
    d->segments[0] = 0;
    d->segment_count = 1;
    int fast = has_avx2();
    while (from < end) {
        size_t plain = fast ? copy_plain_fast(to, from, end) : copy_plain(to, from, end);
        const uint8_t *marker = from + plain;
        to += plain;
        if (marker == end) break;
        for (from = marker + 1; from < end && *from == 0xff;) from++;  /* fill bytes */
        if (from < end && *from == 0) {
            *to++ = 0xff;
        } else if (from < end && *from >= 0xd0 && *from <= 0xd7 && d->segment_count < restarts &&
                   !((*from ^ (d->segment_count - 1)) & 7)) {
            d->segments[d->segment_count++] = to - d->data;
        } else {
            stop = marker;
            break;
        }
        from++;
    }
    d->bits = (bits){.next = d->data};
    d->segment = 0;
    d->segments[d->segment_count] = to - d->data;
    d->end = d->data + d->segments[1];
    d->restart = d->jpeg.restart_interval;
    memset(to, 0, PADDING);
    return stop;
}

/* Replaces libjpeg's decode_mcu if the one above can decode the scan, and, for an image that is not
   scaled, what follows where not all is wanted. */
static void take_over(decoder *d, int scaled) {
    j_decompress_ptr jpeg = &d->jpeg;
    if (jpeg->progressive_mode || jpeg->arith_code || jpeg_has_multiple_scans(jpeg)) return;
    for (int i = 0; i < jpeg->comps_in_scan; i++) {
        const jpeg_component_info *component = jpeg->cur_comp_info[i];
        d->dc[i] = get_table(d->scratch, jpeg->dc_huff_tbl_ptrs[component->dc_tbl_no], DC);
        d->ac[i] = get_table(d->scratch, jpeg->ac_huff_tbl_ptrs[component->ac_tbl_no], AC);
        if (!d->dc[i] || !d->ac[i]) return;
    }
    unstuff(d);
    ((entropy_decoder *)jpeg->entropy)->decode_mcu = decode_mcu;
    if (scaled) return;
    inverse_dcts *inverse = (inverse_dcts *)jpeg->idct;
    for (int i = 0; i < jpeg->num_components; i++) {
        d->inverse_dct[i] = inverse->of_component[i];
        inverse->of_component[i] = invert_wanted;
    }
    post_controller *post = (post_controller *)jpeg->post;
    d->upsample = post->upsample;
    post->upsample = upsample_wanted;
}

/* ---------------------------------------------------------------- progressive files */

/* Fails if there are data before a marker that no MCU takes. libjpeg reads up to 8 bytes ahead. */
static inline void check_end(decoder *d, bits b) {
    if (d->end - (b.next - b.count / 8) >= 8) fail(d, "there are extraneous data");
}

/* Begins an MCU of a progressive scan. */
static inline void begin_mcu(decoder *d) {
    if (d->jpeg.restart_interval && d->restart == 0) check_end(d, d->bits);
    restart(d);
}

/* Ends it. */
static inline void end_mcu(decoder *d, bits b) {
    advance(d, b);
    if (++d->mcu == (size_t)d->jpeg.MCUs_per_row * d->jpeg.MCU_rows_in_scan) check_end(d, b);
}

/* Replace libjpeg's decode_mcu in each kind of scan (ITU T.81 G.1.2). A first scan has the high bits
   of coefficients, one that refines has the next bit of each. */
static boolean decode_dc_first(j_decompress_ptr jpeg, JBLOCKROW *blocks) {
    decoder *d = jpeg->client_data;
    begin_mcu(d);
    bits b = d->bits;
    for (int i = 0; i < jpeg->blocks_in_MCU; i++) {
        int place = jpeg->MCU_membership[i];
        d->predictions[place] += decode_dc(&b, d->dc[place]);
        blocks[i][0][0] = d->predictions[place] << jpeg->Al;
    }
    end_mcu(d, b);
    return TRUE;
}

static boolean refine_dc(j_decompress_ptr jpeg, JBLOCKROW *blocks) {
    decoder *d = jpeg->client_data;
    begin_mcu(d);
    bits b = d->bits;
    fill(&b);
    for (int i = 0; i < jpeg->blocks_in_MCU; i++) {
        blocks[i][0][0] |= b.buffer >> 63 << jpeg->Al;
        drop(&b, 1);
    }
    end_mcu(d, b);
    return TRUE;
}

/* Number of blocks that a code without a coefficient begins: 2^run and the next `run` bits. */
static inline unsigned count_blanks(bits *b, int run) {
    fill(b);
    unsigned count = (1 << run) + (b->buffer >> 1 >> (63 - run));
    drop(b, run);
    return count;
}

static inline uint64_t bit_at(int place) {
    return (uint64_t)1 << (place < 63 ? place : 63);
}

FAST static boolean decode_ac_first(j_decompress_ptr jpeg, JBLOCKROW *blocks) {
    decoder *d = jpeg->client_data;
    begin_mcu(d);
    bits b = d->bits;
    if (d->blanks) {
        d->blanks--;
        end_mcu(d, b);
        return TRUE;
    }
    const table *t = d->ac[0];
    JCOEF *block = blocks[0][0];
    uint64_t *nonzero = d->nonzero[jpeg->cur_comp_info[0]->component_index] + d->mcu;
    uint64_t found = *nonzero;
    for (int k = jpeg->Ss; k <= jpeg->Se; k++) {
        int value;
        fill(&b);
        symbol s = t->look[b.buffer >> (64 - LOOK)];
        if (__builtin_expect(s.length, 1)) {
            k += s.run;
            value = value_at(b.buffer, s);
            drop(&b, s.length);
        } else {
            code c = find(t, b.buffer);
            b.wrong |= !c.length;
            drop(&b, c.length);
            if (!c.size && c.run < 15) {
                d->blanks = count_blanks(&b, c.run) - 1;
                break;
            }
            k += c.run;
            if (!c.size) continue;
            value = value_of(b.buffer, c.size);
            drop(&b, c.size);
        }
        JCOEF shifted = (unsigned)value << jpeg->Al;
        block[natural[k]] = shifted;
        found = shifted ? found | bit_at(k) : found & ~bit_at(k);
    }
    *nonzero = found;
    end_mcu(d, b);
    return TRUE;
}

/* The bits of a word, the last first. */
static inline uint64_t reversed(uint64_t word) {
    const uint64_t ones = 0x5555555555555555, twos = 0x3333333333333333, fours = 0x0f0f0f0f0f0f0f0f;
    word = __builtin_bswap64(word);
    word = (word >> 4 & fours) | (word & fours) << 4;
    word = (word >> 2 & twos) | (word & twos) << 2;
    return (word >> 1 & ones) | (word & ones) << 1;
}

/* Gives each place in a mask, from the lowest on, the next of the bits, from the lowest on. */
ALWAYS_INLINE uint64_t deposit(uint64_t bits, uint64_t mask, int fast) {
    uint64_t result = 0;
#ifdef AVX2
    if (fast) {
        __asm__("pdepq %2, %1, %0" : "=r"(result) : "r"(bits), "r"(mask));
        return result;
    }
#endif
    for (; mask && bits; mask &= mask - 1, bits >>= 1)
        if (bits & 1) result |= mask & -mask;
    return result;
}

/* Reads a bit for each of `some` coefficients, and adds it. */
ALWAYS_INLINE void correct(bits *b, JCOEF *block, uint64_t some, int low, int fast) {
    int count = __builtin_popcountll(some), whole = count <= 56;
    uint64_t part = whole ? some : some & 0xffffffff;
    for (;;) {
        if (b->count < count) fill(b);
        uint64_t ones = deposit(reversed(b->buffer), part, fast);
        drop(b, whole ? count : __builtin_popcountll(part));
        for (; ones; ones &= ones - 1) {
            JCOEF *c = block + natural[__builtin_ctzll(ones)];
            *c += ((*c >> 15) | 1) * (1 << low) & -(~(*c >> low) & 1);
        }
        if (whole || part != (some & 0xffffffff)) return;
        part = some & ~(uint64_t)0xffffffff;
    }
}

/* Refines the AC coefficients of a block. */
ALWAYS_INLINE void refine_block(decoder *d, JCOEF *block, int fast) {
    j_decompress_ptr jpeg = &d->jpeg;
    bits b = d->bits;
    int low = jpeg->Al;
    uint64_t *nonzero = d->nonzero[jpeg->cur_comp_info[0]->component_index] + d->mcu;
    uint64_t before = *nonzero, found = before;
    uint64_t left = ~(uint64_t)0 >> (63 - jpeg->Se) & ~(uint64_t)0 << jpeg->Ss;  /* to come */
    while (left && !d->blanks) {
        fill(&b);
        code c = find(d->ac[0], b.buffer);
        drop(&b, c.length);
        b.wrong |= !c.length || c.size > 1;
        if (!c.size && c.run < 15) {
            d->blanks = count_blanks(&b, c.run);
            break;
        }
        int positive = b.buffer >> 63;
        drop(&b, c.size & 1);
        /* the place of the new coefficient; 0: it is beyond those of this scan */
        uint64_t place = deposit((uint64_t)1 << c.run, left & ~before, fast);
        correct(&b, block, left & before & (place - 1), low, fast);
        left &= ~(place ^ (place - 1));
        if (c.size) {
            int k = place ? __builtin_ctzll(place) : jpeg->Se + 1;
            block[natural[k]] = positive ? 1 << low : -(1 << low);
            found |= bit_at(k);
        }
    }
    if (d->blanks) {
        correct(&b, block, left & before, low, fast);
        d->blanks--;
    }
    *nonzero = found;
    end_mcu(d, b);
}

static boolean refine_ac(j_decompress_ptr jpeg, JBLOCKROW *blocks) {
    begin_mcu(jpeg->client_data);
    refine_block(jpeg->client_data, blocks[0][0], 0);
    return TRUE;
}

#ifdef AVX2
__attribute__((target("arch=x86-64-v3"))) static boolean refine_ac_fast(j_decompress_ptr jpeg,
                                                                        JBLOCKROW *blocks) {
    begin_mcu(jpeg->client_data);
    refine_block(jpeg->client_data, blocks[0][0], 1);
    return TRUE;
}

/* Whether there is a `pdep` that is no slower than its replacement. */
static int has_deposit(void) {
    return has_avx2() && __builtin_cpu_supports("bmi2") && !__builtin_cpu_is("amdfam17h");
}
#else
#define refine_ac_fast refine_ac
#define has_deposit() 0
#endif

/* Replaces libjpeg's decode_mcu for a scan; leaves this and all later ones to libjpeg if it cannot. */
static void take_over_scan(decoder *d) {
    j_decompress_ptr jpeg = &d->jpeg;
    const jpeg_component_info *component = jpeg->cur_comp_info[0];
    int ac = jpeg->Ss > 0, first = jpeg->Ah == 0, known = !d->left_to_libjpeg;
    for (int i = 0; i < jpeg->comps_in_scan && !ac && first && known; i++) {
        int number = jpeg->cur_comp_info[i]->dc_tbl_no;
        known = (d->dc[i] = get_table(d->scratch, jpeg->dc_huff_tbl_ptrs[number], DC)) != NULL;
    }
    if (ac && known) {
        const JHUFF_TBL *huffman = jpeg->ac_huff_tbl_ptrs[component->ac_tbl_no];
        uint64_t **nonzero = &d->nonzero[component->component_index];
        size_t count = (size_t)component->width_in_blocks * component->height_in_blocks;
        if (!*nonzero && !(*nonzero = calloc(count, sizeof **nonzero))) fail(d, "out of memory");
        known = (d->ac[0] = get_table(d->scratch, huffman, PROGRESSIVE)) != NULL;
    }
    d->left_to_libjpeg = !known;
    if (!known) return;
    const uint8_t *marker = unstuff(d);
    jpeg->src->bytes_in_buffer -= marker - jpeg->src->next_input_byte;
    jpeg->src->next_input_byte = marker;
    d->mcu = d->blanks = 0;
    memset(d->predictions, 0, sizeof d->predictions);
    ((entropy_decoder *)jpeg->entropy)->decode_mcu =
        first ? (ac ? decode_ac_first : decode_dc_first) :
        !ac ? refine_dc : has_deposit() ? refine_ac_fast : refine_ac;
}

/* Replaces libjpeg's start_pass, which checks the scan's parameters. */
static void start_scan(j_decompress_ptr jpeg) {
    decoder *d = jpeg->client_data;
    d->start_pass(jpeg);
    take_over_scan(d);
}

/* libjpeg calls this once it has started the first scan, before it decodes any of it. */
static void on_start(j_common_ptr jpeg) {
    decoder *d = jpeg->client_data;
    entropy_decoder *entropy = (entropy_decoder *)d->jpeg.entropy;
    jpeg->progress = NULL;
    d->start_pass = entropy->start_pass;
    entropy->start_pass = start_scan;
    take_over_scan(d);
}

/* ---------------------------------------------------------------- windows */

static void on_error(j_common_ptr jpeg) {
    decoder *d = (decoder *)((char *)jpeg->err - offsetof(decoder, errors));
    jpeg->err->format_message(jpeg, d->message);
    longjmp(d->escape, 1);
}

static void on_warning(j_common_ptr jpeg, int level) {
    if (level < 0) on_error(jpeg);
}

/* Number of scans in a file. Each covers the whole image, however few bytes it has. */
static size_t count_scans(const uint8_t *data, const uint8_t *end) {
    size_t count = 0;
    while ((data = memchr(data, 0xff, end - data)) && end - ++data >= 4)
        count += data[0] == 0xda && !data[1] && data[3] && data[3] < 5 && data[2] == 6 + 2 * data[3];
    return count;
}

static decoder *begin(const uint8_t *data, size_t size) {
    scratch *kept = get_scratch();
    decoder *d = kept ? calloc(1, sizeof *d) : NULL;
    if (!d) return NULL;
    d->scratch = kept;
    d->jpeg.err = jpeg_std_error(&d->errors);
    d->errors.error_exit = on_error;
    d->errors.emit_message = on_warning;
    if (!setjmp(d->escape)) {
        jpeg_create_decompress(&d->jpeg);
        d->jpeg.client_data = d;
        jpeg_mem_src(&d->jpeg, (unsigned char *)data, size);
        jpeg_save_markers(&d->jpeg, JPEG_APP0 + 1, 0xffff);
        jpeg_read_header(&d->jpeg, TRUE);
        if ((uint64_t)d->jpeg.image_height * d->jpeg.image_width > MAX_PIXELS)
            fail(d, "the image is too large");
        if (jpeg_has_multiple_scans(&d->jpeg) && (double)d->jpeg.image_height *
            d->jpeg.image_width * count_scans(data, data + size) > MAX_WORK)
            fail(d, "there are too many scans");
        if (d->jpeg.jpeg_color_space != JCS_YCbCr && d->jpeg.jpeg_color_space != JCS_GRAYSCALE &&
            d->jpeg.jpeg_color_space != JCS_RGB)
            fail(d, "the colours are not RGB");
    }
    return d;
}

static void free_resizer(resizer *r) {
    free(r->line);
    free(r->across.start);
    free(r->across.weights);
    free(r->across.pairs);
    free(r->down.start);
    free(r->down.weights);
}

static void end(decoder *d) {
    jpeg_destroy_decompress(&d->jpeg);
    free(d->segments);
    for (int i = 0; i < MAX_COMPONENTS; i++) free(d->nonzero[i]);
    free(d->in_column);
    free(d->in_row);
    free_resizer(&d->resizer);
    trim(&d->scratch->data, &d->scratch->data_size);
    trim(&d->scratch->rows, &d->scratch->rows_size);
    free(d);
}

/* Sets of each MCU along one axis the blocks with pixels that the filter takes, or that colours of
   these are interpolated from. `first` is the place of the filter's first pixel, of `length` pixels.
   A block that is not wanted is skipped, and its pixels are wrong. */
static void mark_blocks(decoder *d, uint16_t *wanted, int count, const filter *f, int first,
                        int length, int down) {
    j_decompress_ptr jpeg = &d->jpeg;
    int *before = calloc(length + 1, sizeof *before);  /* pixels that are taken, before each */
    if (!before) fail(d, "out of memory");
    for (int i = 0; i < f->size; i++)
        for (int k = 0; k < f->taps; k++) before[first + f->start[i] + k + 1] = 1;
    for (int i = 0; i < length; i++) before[i + 1] += before[i];
    for (int c = 0, bit = 0; c < jpeg->comps_in_scan; c++) {
        const jpeg_component_info *component = jpeg->cur_comp_info[c];
        int blocks = down ? component->MCU_height : component->MCU_width;
        /* pixels of a block: one component alone is never subsampled */
        int pixels = 8 * (down ? jpeg->max_v_samp_factor : jpeg->max_h_samp_factor) /
                     (down ? component->v_samp_factor : component->h_samp_factor);
        int beside = pixels > 8 ? pixels / 8 : 0;  /* smooth upsampling takes the next sample, too */
        for (int i = 0; i < component->MCU_height * component->MCU_width; i++, bit++) {
            int place = down ? i / component->MCU_width : i % component->MCU_width;
            for (int mcu = 0; mcu < count; mcu++) {
                int from = (mcu * blocks + place) * pixels - beside, to = from + pixels + 2 * beside;
                from = from < 0 ? 0 : from > length ? length : from;
                to = to > length ? length : to;
                if (before[to] > before[from]) wanted[mcu] |= 1 << bit;
            }
        }
    }
    free(before);
}

/* Begins to decode a window of the image scaled by 1 / `denominator`, and moves the window to its
   place in the rows that `get_rows` returns. Their pixels that the filters take are bit-identical to
   those of the whole image, decoded with libjpeg's accurate inverse DCT, or its fast one, which is
   TensorFlow's. A scaled image with a sampling factor above 2 is decoded whole down to the end of the
   window: libjpeg-turbo upsamples some of these windows with wrong neighbours. Entropy decoding is
   that of this file if `entropy`, else libjpeg's; the bits are the same. */
static void start_rows(decoder *d, window *w, int denominator, int fast, int entropy) {
    j_decompress_ptr jpeg = &d->jpeg;
    int part = denominator == 1 || (jpeg->max_h_samp_factor <= 2 && jpeg->max_v_samp_factor <= 2);
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg->dct_method = fast ? JDCT_IFAST : JDCT_ISLOW;
    jpeg->scale_num = 1;
    jpeg->scale_denom = denominator;
    if (entropy && jpeg->progressive_mode && !jpeg->arith_code) {
        d->progress.progress_monitor = on_start;
        jpeg->progress = &d->progress;
    }
    jpeg_start_decompress(jpeg);
    jpeg->progress = NULL;
    unsigned columns = jpeg->MCUs_per_row, rows = jpeg->MCU_rows_in_scan;
    d->in_column = malloc(columns * sizeof *d->in_column);
    d->in_row = malloc(rows * sizeof *d->in_row);
    if (!d->in_column || !d->in_row) fail(d, "out of memory");
    memset(d->in_column, denominator == 1 ? 0 : 255, columns * sizeof *d->in_column);
    memset(d->in_row, denominator == 1 ? 0 : 255, rows * sizeof *d->in_row);
    if (denominator == 1) {
        mark_blocks(d, d->in_column, columns, &d->resizer.across, w->x, jpeg->output_width, 0);
        mark_blocks(d, d->in_row, rows, &d->resizer.down, w->y, jpeg->output_height, 1);
    }
    /* One MCU more on either side: smooth upsampling of colours uses the neighbours. */
    int step = 8 * jpeg->max_h_samp_factor / denominator;
    int from = w->x >= step ? w->x - step : 0, to = w->x + w->width + step;
    if (to > (int)jpeg->output_width || !part) to = jpeg->output_width;
    if (!part) from = 0;
    JDIMENSION left = from, width = to - from;
    jpeg_crop_scanline(jpeg, &left, &width);
    int mcu = jpeg->num_components == 1 ? 8 / denominator : step;
    d->first_column = left / mcu;
    d->last_column = (left + width - 1) / mcu;
    if (entropy) take_over(d, denominator > 1);
    d->stride = (size_t)(width + 15) / 16 * 64;
    int skipped = part ? w->y : 0, last = w->y + w->height - skipped;
    d->room = 2 * d->resizer.down.taps + ROOM / d->stride;
    if (d->room > last) d->room = last;
    d->rows = reserve(&d->scratch->rows, &d->scratch->rows_size, d->room * d->stride + 8);
    if (!d->rows) fail(d, "out of memory");
    d->rows += 8;  /* libjpeg-turbo writes aligned rows around the cache, but they are read at once */
    if (skipped) jpeg_skip_scanlines(jpeg, skipped);
    w->y -= skipped;
    w->x -= left;
}

/* Decodes up to row `end`, and keeps the rows from the `kept`th place of d->rows on. */
static void read_rows(decoder *d, int kept, int end, int keep) {
    d->discard = !keep;
    while (d->next_row < end) {
        JSAMPROW rows[8];
        int count = end - d->next_row < 8 ? end - d->next_row : 8;
        for (int i = 0; i < count; i++) rows[i] = d->rows + (kept + i * keep) * d->stride;
        count = jpeg_read_scanlines(&d->jpeg, rows, count);
        d->next_row += count;
        kept += count * keep;
    }
}

/* Decodes `count` rows from `first` on, which never descends. Earlier rows are lost. */
static const uint8_t *get_rows(decoder *d, int first, int count) {
    if (first >= d->next_row) {
        read_rows(d, 0, first, 0);
        d->first_row = first;
    } else if (first + count - d->first_row > d->room) {
        const uint8_t *from = d->rows + (first - d->first_row) * d->stride;
        memmove(d->rows, from, (d->next_row - first) * d->stride);
        d->first_row = first;
    }
    read_rows(d, d->next_row - d->first_row, first + count, 1);
    return d->rows + (first - d->first_row) * d->stride;
}

/* ---------------------------------------------------------------- resizing */

static double triangle(double x) {
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

static double cubic(double x) {  /* Keys, a = -0.5 */
    x = fabs(x);
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

enum { LINEAR, CUBIC, AREA };

/* Centre of output pixel i of `size` in a row of `extent` pixels, as TensorFlow's resize_bicubic has
   it: in float32, with the fraction of the pixel in steps of 1 / 1024, those of its table. */
static double tabulated_centre(double extent, int i, int size) {
    float place = (i + 0.5f) * ((float)extent / size) - 0.5f;
    return floorf(place) + rint((place - floorf(place)) * 1024.0) / 1024 + 0.5;
}

/* Makes the filter from a row of `from` pixels to `size`, which cover `extent` pixels from `origin`
   on. Pixel centres are at halves. Returns 0 without memory. */
FAST static int make_filter(filter *f, int from, double origin, double extent, int size, int kind,
                       int antialias) {
    double scale = extent / size, stretch = antialias && scale > 1 ? scale : 1;
    double support = kind == AREA ? scale / 2 + 1 : (kind == CUBIC ? 2 : 1) * stretch;
    int taps = 2 * (int)ceil(support) + 1;
    if (taps > from) taps = from;
    f->start = malloc(size * sizeof(int));
    f->weights = calloc((size_t)size * taps, sizeof(float));
    if (!f->start || !f->weights) return 0;
    f->size = size;
    f->taps = 1;
    for (int i = 0; i < size; i++) {
        double left = origin + i * scale, centre = left + scale / 2, total = 0;
        if (kind == CUBIC && !antialias) centre = origin + tabulated_centre(extent, i, size);
        int low = (int)floor(centre - support), high = (int)ceil(centre + support);
        int start = low < 0 ? 0 : low > from - taps ? from - taps : low;
        float *weights = f->weights + (size_t)i * taps;
        for (int j = low < 0 ? 0 : low; j < high && j < from; j++) {
            double x = (j + 0.5 - centre) / stretch;
            double weight = kind == AREA    ? fmax(fmin(left + scale, j + 1) - fmax(left, j), 0)
                            : kind == CUBIC ? cubic(x)
                                            : triangle(x);
            if (weight == 0) continue;
            weights[j - start] = weight;
            total += weight;
        }
        int first = 0, last = taps - 1;
        while (first < last && weights[first] == 0) first++;
        while (last > first && weights[last] == 0) last--;
        for (int k = 0; k < taps; k++) weights[k] = k <= last - first ? weights[first + k] / total : 0;
        f->start[i] = start + first;
        if (f->taps < last - first + 1) f->taps = last - first + 1;
    }
    /* All have as many taps as the widest, none of them outside, and starts ascend. */
    for (int i = size - 1, most = from - f->taps; i >= 0; i--) {
        float *weights = f->weights + (size_t)i * taps;
        int late = f->start[i] > most ? f->start[i] - most : 0;
        if (late) {
            memmove(weights + late, weights, (f->taps - late) * sizeof(float));
            memset(weights, 0, late * sizeof(float));
        }
        most = f->start[i] -= late;
    }
    for (int i = 1; i < size; i++)
        memmove(f->weights + (size_t)i * f->taps, f->weights + (size_t)i * taps,
                f->taps * sizeof(float));
    return 1;
}

/* Sums `count` rows of RGBX bytes by their weights to one row of RGBX floats [width]. */
FAST static void add_rows(float *sum, const uint8_t *row, size_t stride, const float *weights,
                          int count, int width) {
    if (count == 2) {
        for (int j = 0; j < width * 4; j++)
            sum[j] = weights[0] * row[j] + weights[1] * row[stride + j];
        return;
    }
    for (int j = 0; j < width * 4; j++) sum[j] = weights[0] * row[j];
    for (int k = 1; k < count; k++) {
        row += stride;
        for (int j = 0; j < width * 4; j++) sum[j] += weights[k] * row[j];
    }
}

/* Sums RGBX floats by their weights to the RGBX bytes of one output pixel. */
static inline int32_t add_taps(const pixel *p, const float *weights, int taps, float half) {
    const pixel zero = {0}, round = {half, half, half, half};
    const integers white = {255, 255, 255, 255};
    const bytes low_bytes = {0, 4, 8, 12};
    pixel total = weights[0] * p[0];
    for (int k = 1; k < taps; k++) total += weights[k] * p[k];
    total += round;
    integers whole = __builtin_convertvector(total, integers) & (total > zero);
    integers above = whole > white;
    whole = (whole & ~above) | (white & above);
    return ((integers)__builtin_shuffle((bytes)whole, low_bytes))[0];
}

#ifdef AVX2
/* The same for two output pixels, as integers without bounds. */
INLINE_AVX2 __m256i add_two(const pixel *p, const pixel *q, const float *weights, int taps,
                            __m256 half) {
    __m256 total = _mm256_setzero_ps();
    for (int k = 0; k < taps; k++) {
        __m256 both = _mm256_insertf128_ps(_mm256_castps128_ps256(p[k]), q[k], 1);
        both = _mm256_mul_ps(both, _mm256_loadu_ps(weights + 8 * k));
        total = k ? _mm256_add_ps(total, both) : both;
    }
    return _mm256_cvttps_epi32(_mm256_add_ps(total, half));
}

INLINE_AVX2 void add_fours(uint8_t *rgb, const pixel *from, const filter *f, int taps, int flip,
                           float half) {
    const __m128i order = flip ? _mm_setr_epi8(12, 13, 14, 8, 9, 10, 4, 5, 6, 0, 1, 2, -1, -1, -1, -1)
                               : _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m256 halves = _mm256_set1_ps(half);
    const float *weights = f->pairs;
    const int *start = f->start, *end = start + f->size / 4 * 4;
    uint8_t *to = rgb + (flip ? 3 * (f->size - 4) : 0);
    for (; start < end; start += 4, weights += 16 * taps, to += flip ? -12 : 12) {
        __m256i low = add_two(from + start[0], from + start[1], weights, taps, halves);
        __m256i high = add_two(from + start[2], from + start[3], weights + 8 * taps, taps, halves);
        __m256i whole = _mm256_packs_epi32(low, high);  /* saturates, as the next does */
        whole = _mm256_packus_epi16(whole, whole);
        __m128i four = _mm_unpacklo_epi32(_mm256_castsi256_si128(whole),
                                          _mm256_extracti128_si256(whole, 1));
        four = _mm_shuffle_epi8(four, order);
        _mm_storel_epi64((__m128i *)to, four);
        int32_t last = _mm_extract_epi32(four, 2);
        memcpy(to + 8, &last, 4);
    }
}

/* Filters a row like `add_columns`, four pixels at a time; returns their number. */
AVX2 static int add_quads(uint8_t *rgb, const pixel *from, const filter *f, int flip, float half) {
    if (f->taps == 2)
        add_fours(rgb, from, f, 2, flip, half);
    else
        add_fours(rgb, from, f, f->taps, flip, half);
    return f->size / 4 * 4;
}

/* Makes `pairs` of a filter; 0 without memory. */
static int make_pairs(filter *f) {
    if (!has_avx2()) return 1;
    int taps = f->taps, end = f->size / 4 * 4;
    float *to = f->pairs = malloc(((size_t)end * taps * 4 + 1) * sizeof *to);
    for (int i = 0; to && i < end; i += 2)
        for (int k = 0; k < taps; k++)
            for (int j = 0; j < 8; j++) *to++ = f->weights[(size_t)(i + j / 4) * taps + k];
    return f->pairs != NULL;
}
#else
static int add_quads(uint8_t *rgb, const pixel *from, const filter *f, int flip, float half) {
    return 0;
}

static int make_pairs(filter *f) {
    return 1;
}
#endif

/* Filters a row of RGBX floats to RGB [f->size], mirrored if `flip`. */
FAST static void add_columns(uint8_t *rgb, const pixel *from, const filter *f, int flip, float half) {
    int taps = f->taps, i = f->pairs ? add_quads(rgb, from, f, flip, half) : 0;
    for (; i < f->size; i++) {
        int32_t rgbx = add_taps(from + f->start[i], f->weights + (size_t)i * taps, taps, half);
        memcpy(rgb + 3 * (flip ? f->size - 1 - i : i), &rgbx, 3);
    }
}

/* Makes what resizes a part of a window to RGB [height, width, 3]; 0 without memory. */
static int make_resizer(resizer *r, window w, part p, int height, int width, int kind,
                        int antialias) {
    r->line = aligned_alloc(64, ((size_t)w.width * sizeof(pixel) + 63) / 64 * 64);
    return r->line && make_filter(&r->across, w.width, p.x, p.width, width, kind, antialias) &&
           make_filter(&r->down, w.height, p.y, p.height, height, kind, antialias) &&
           make_pairs(&r->across);
}

/* Resizes a window to RGB [height, width, 3], mirrored if `flip`: of RGBX rows, or if they are NULL
   of those that d decodes. Rounds values to the nearest, or without antialiasing towards zero, as
   TensorFlow's casts do. */
static void resize(const resizer *r, decoder *d, const uint8_t *rows, size_t stride, window w,
                   uint8_t *out, int antialias, int flip) {
    int taps = r->down.taps, height = r->down.size, width = r->across.size;
    float half = antialias ? 0.5f : CUT;
    for (int i = 0; i < height; i++) {
        int first = w.y + r->down.start[i];
        const uint8_t *row = rows ? rows + first * stride : get_rows(d, first, taps);
        add_rows(r->line, row + w.x * 4, stride, r->down.weights + (size_t)i * taps, taps, w.width);
        add_columns(out + (size_t)i * width * 3, (pixel *)r->line, &r->across, flip, half);
    }
}

/* ---------------------------------------------------------------- warping */

/* Rounds half away from 0, as C's roundf; -1 where that is outside of `size` pixels. */
static inline int nearest(float x, int size) {
    int whole = (int)x;
    whole += x - whole >= 0.5f;
    return (x > -0.5f) & (x < size - 0.5f) ? whole : -1;
}

/* Finds the pixels of row y that `warp` takes, by their indices in the image; -1: none. */
FAST static void find_pixels(int *found, int y, int height, int width, const float *m) {
    for (int x = 0; x < width; x++) {
        int column = nearest(m[0] * x + m[1] * y + m[2], width);
        int row = nearest(m[3] * x + m[4] * y + m[5], height);
        found[x] = (row | column) < 0 ? -1 : row * width + column;
    }
}

/* Takes each pixel (x, y) of RGB [height, width, 3] from the one nearest to (a x + b y + c,
   d x + e y + f), `m` being a to f, or fills it where there is none; 0 without memory. In float32 and
   in the order of TensorFlow's ImageProjectiveTransformV3, since ties are common: a shear by 0.3 has
   them in every tenth row. */
static int warp(const uint8_t *image, uint8_t *out, int height, int width, const float *m, int fill) {
    int *found = malloc(width * sizeof *found);
    for (int y = 0; found && y < height; y++) {
        find_pixels(found, y, height, width, m);
        for (int x = 0; x < width; x++, out += 3) {
            if (found[x] < 0)
                memset(out, fill, 3);
            else
                memcpy(out, image + (size_t)found[x] * 3, 3);
        }
    }
    free(found);
    return found != NULL;
}

/* ---------------------------------------------------------------- Python */

/* Gets the buffer of an array uint8 [height, width, 3]; else sets an exception and returns 0. */
static int get_image(PyObject *array, Py_buffer *b, int flags) {
    if (PyObject_GetBuffer(array, b, PyBUF_ND | flags)) return 0;
    if (b->ndim == 3 && b->itemsize == 1 && b->shape[2] == 3 && b->shape[0] > 0 && b->shape[1] > 0)
        return 1;
    PyBuffer_Release(b);
    PyErr_SetString(PyExc_ValueError, "not a uint8 array [H, W, 3]");
    return 0;
}

/* Whether a window lies in an image; sets an exception if it does not. */
static int inside(window w, Py_ssize_t height, Py_ssize_t width) {
    if (w.y >= 0 && w.x >= 0 && w.height > 0 && w.width > 0 && w.height <= height - w.y &&
        w.width <= width - w.x)
        return 1;
    PyErr_Format(PyExc_ValueError, "window (%d, %d, %d, %d) is not inside of (%zd, %zd)", w.y, w.x,
                 w.height, w.width, height, width);
    return 0;
}

static PyObject *py_size(PyObject *self, PyObject *args) {
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "y*", &data)) return NULL;
    decoder *d = begin(data.buf, data.len);
    PyObject *result = NULL;
    if (!d) {
        PyErr_NoMemory();
    } else if (d->message[0]) {
        PyErr_SetString(PyExc_ValueError, d->message);
    } else {
        jpeg_saved_marker_ptr m = d->jpeg.marker_list;
        while (m && (m->data_length < 6 || memcmp(m->data, "Exif\0", 6))) m = m->next;
        result = Py_BuildValue("IIy#", d->jpeg.image_height, d->jpeg.image_width,
                               m ? (char *)m->data : "", (Py_ssize_t)(m ? m->data_length : 0));
    }
    if (d) end(d);
    PyBuffer_Release(&data);
    return result;
}

static PyObject *py_view(PyObject *self, PyObject *args) {
    Py_buffer data, out;
    PyObject *array;
    window w;
    part p;
    int denominator, kind, antialias, flip, entropy, ok = 0;
    if (!PyArg_ParseTuple(args, "y*O(iiii)(dddd)iippp", &data, &array, &w.y, &w.x, &w.height,
                          &w.width, &p.y, &p.x, &p.height, &p.width, &denominator, &kind,
                          &antialias, &flip, &entropy))
        return NULL;
    if (!get_image(array, &out, PyBUF_WRITABLE)) {
        PyBuffer_Release(&data);
        return NULL;
    }
    decoder *d = begin(data.buf, data.len);
    if (!d) {
        PyErr_NoMemory();
    } else if (!d->message[0] &&
               inside(w, (d->jpeg.image_height + denominator - 1) / denominator,
                      (d->jpeg.image_width + denominator - 1) / denominator)) {
        Py_BEGIN_ALLOW_THREADS;
        if (!setjmp(d->escape)) {
            if (!make_resizer(&d->resizer, w, p, out.shape[0], out.shape[1], kind, antialias))
                fail(d, "out of memory");
            start_rows(d, &w, denominator, !antialias, entropy);
            resize(&d->resizer, d, NULL, d->stride, w, out.buf, antialias, flip);
        }
        Py_END_ALLOW_THREADS;
        ok = !d->message[0];
    }
    if (d && d->message[0]) PyErr_SetString(PyExc_ValueError, d->message);
    if (d) end(d);
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

/* Copies a window of RGB [height, width, 3] to rows of 4 bytes per pixel; NULL without memory. */
static uint8_t *padded(const uint8_t *image, Py_ssize_t width, window w) {
    uint8_t *rows = malloc((size_t)w.height * w.width * 4);
    for (int i = 0; rows && i < w.height; i++) {
        const uint8_t *from = image + ((size_t)(w.y + i) * width + w.x) * 3;
        uint8_t *to = rows + (size_t)i * w.width * 4;
        for (int j = 0; j < w.width; j++, from += 3, to += 4) {
            memcpy(to, from, 3);
            to[3] = 0;
        }
    }
    return rows;
}

static PyObject *py_resize(PyObject *self, PyObject *args) {
    Py_buffer image, out;
    PyObject *from, *to;
    window w;
    int kind, antialias, flip, ok = 0;
    if (!PyArg_ParseTuple(args, "OO(iiii)ipp", &from, &to, &w.y, &w.x, &w.height, &w.width, &kind,
                          &antialias, &flip))
        return NULL;
    if (!get_image(from, &image, 0)) return NULL;
    if (!get_image(to, &out, PyBUF_WRITABLE)) {
        PyBuffer_Release(&image);
        return NULL;
    }
    if (inside(w, image.shape[0], image.shape[1])) {
        Py_BEGIN_ALLOW_THREADS;
        uint8_t *rows = padded(image.buf, image.shape[1], w);
        part whole = {0, 0, w.height, w.width};
        resizer r = {0};
        ok = rows && make_resizer(&r, w, whole, out.shape[0], out.shape[1], kind, antialias);
        w.y = w.x = 0;
        if (ok) resize(&r, NULL, rows, (size_t)w.width * 4, w, out.buf, antialias, flip);
        free_resizer(&r);
        free(rows);
        Py_END_ALLOW_THREADS;
        if (!ok) PyErr_NoMemory();
    }
    PyBuffer_Release(&image);
    PyBuffer_Release(&out);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_warp(PyObject *self, PyObject *args) {
    Py_buffer image, out;
    PyObject *from, *to;
    float m[6];
    int fill, ok;
    if (!PyArg_ParseTuple(args, "OO(ffffff)i", &from, &to, m, m + 1, m + 2, m + 3, m + 4, m + 5,
                          &fill))
        return NULL;
    if (!get_image(from, &image, 0)) return NULL;
    if (!get_image(to, &out, PyBUF_WRITABLE)) {
        PyBuffer_Release(&image);
        return NULL;
    }
    ok = image.shape[0] == out.shape[0] && image.shape[1] == out.shape[1] &&
         image.buf != out.buf && out.len / 3 <= MAX_PIXELS;
    if (ok) {
        Py_BEGIN_ALLOW_THREADS;
        ok = warp(image.buf, out.buf, out.shape[0], out.shape[1], m, fill);
        Py_END_ALLOW_THREADS;
        if (!ok) PyErr_NoMemory();
    } else {
        PyErr_SetString(PyExc_ValueError, "not two arrays of one shape");
    }
    PyBuffer_Release(&image);
    PyBuffer_Release(&out);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

/* The compiled version, as '2.1.5', and the last year of the loaded library's copyright, '2023'; it
   tells no version. '' if it is not libjpeg-turbo. */
static PyObject *py_versions(PyObject *self, PyObject *args) {
    struct jpeg_error_mgr errors;
    const char *loaded = "";
    jpeg_std_error(&errors);
    for (int i = 0; i <= errors.last_jpeg_message; i++) {
        const char *start = "Copyright (C) 1991-", *text = errors.jpeg_message_table[i];
        if (text && !strncmp(text, start, strlen(start)) && strstr(text, "libjpeg-turbo"))
            loaded = text + strlen(start);
    }
    return Py_BuildValue("ss#", QUOTE(LIBJPEG_TURBO_VERSION), loaded, (Py_ssize_t)strcspn(loaded, " "));
}

static PyMethodDef methods[] = {
    {"versions", py_versions, METH_NOARGS, "versions() -> (compiled, year of the loaded)"},
    {"size", py_size, METH_VARARGS, "size(data) -> (height, width, EXIF data)"},
    {"view", py_view, METH_VARARGS,
     "view(data, out, (y, x, height, width), part of it, denominator, kind, antialias, flip, "
     "entropy decoding by this extension)"},
    {"resize", py_resize, METH_VARARGS,
     "resize(image, out, (y, x, height, width), kind, antialias, flip)"},
    {"warp", py_warp, METH_VARARGS, "warp(image, out, (a, b, c, d, e, f), fill)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_jpeg", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__jpeg(void) {
    if (pthread_key_create(&scratch_of_thread, free_scratch)) return PyErr_NoMemory();
    return PyModule_Create(&module);
}
