/* Label maps of bytes: undoes the filters of a PNG, counts, maps and gathers values.

   Pillow takes three times as long as `unfilter` to undo Paeth's filter, and NumPy has no fast look-ups
   in or of bytes. All functions release the GIL, and raise ValueError. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Paeth's predictor of a pixel from those to the left, above, and above to the left (PNG section
   9.4). Without branches: label maps change at random. */
static inline uint8_t paeth(int left, int above, int corner) {
    int by_left = abs(above - corner), by_above = abs(left - corner);
    int by_corner = abs(left + above - 2 * corner);
    int best = by_above <= by_corner ? above : corner;
    return (by_left <= by_above) & (by_left <= by_corner) ? left : best;
}

/* Rows are read eight bytes at a time: most of a label map is equal to its neighbours. */
enum { WORD = 8 };

static inline uint64_t word(const uint8_t *from) {
    uint64_t bytes;
    memcpy(&bytes, from, WORD);
    return bytes;
}

static inline uint64_t repeated(uint8_t byte) {
    return byte * UINT64_C(0x0101010101010101);
}

/* Number of bytes before the first in memory that is not 0. */
static inline int zeros(uint64_t bytes) {
    if (!bytes) return WORD;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_clzll(bytes) / 8;
#else
    return __builtin_ctzll(bytes) / 8;
#endif
}

/* Undoes Paeth's filter. Where the prediction is right, it is the pixel above after equal pixels to
   the left, and the one to the left below equal pixels: both are runs, copied or filled by words. */
static void unfilter_paeth(const uint8_t *from, const uint8_t *above, uint8_t *to,
                           Py_ssize_t width) {
    uint8_t left = 0, corner = 0;
    Py_ssize_t x = 0;
    while (x < width) {
        if (x + WORD <= width) {
            uint64_t wrong = word(from + x), over = word(above + x);
            int equal = left == corner;
            uint64_t made = equal ? over : repeated(left);
            int n = zeros(equal ? wrong : wrong | (over ^ repeated(corner)));
            if (n) {
                memcpy(to + x, &made, WORD); /* from x + n on they are written again below */
                x += n;
                left = to[x - 1];
                corner = above[x - 1];
                if (n == WORD) continue;
            }
        }
        to[x] = left = from[x] + paeth(left, above[x], corner);
        corner = above[x++];
    }
}

/* Undoes the filter that adds the pixel to the left. */
static void unfilter_left(const uint8_t *from, uint8_t *to, Py_ssize_t width) {
    uint8_t left = 0;
    Py_ssize_t x = 0;
    for (; x + WORD <= width; x += WORD) {
        if (word(from + x)) {
            for (int i = 0; i < WORD; i++) to[x + i] = left = from[x + i] + left;
        } else {
            uint64_t made = repeated(left);
            memcpy(to + x, &made, WORD);
        }
    }
    for (; x < width; x++) to[x] = left = from[x] + left;
}

/* Undoes the filter of a row of bytes; `above` is the row before it, zeros for the first. 0 if there
   is no such filter. */
static int unfilter_row(int filter, const uint8_t *from, const uint8_t *above, uint8_t *to,
                        Py_ssize_t width) {
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
        unfilter_paeth(from, above, to, width);
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
    if (out.ndim != 2 || data.len != out.shape[0] * (out.shape[1] + 1)) {
        why = "not [H, W + 1] bytes for [H, W]";
    } else {
        Py_ssize_t height = out.shape[0], width = out.shape[1];
        uint8_t *zeros = calloc(width + 1, 1);
        int ok = zeros != NULL;
        Py_BEGIN_ALLOW_THREADS;
        const uint8_t *row = data.buf, *above = zeros;
        uint8_t *place = out.buf;
        for (Py_ssize_t y = 0; ok && y < height; y++) {
            ok = unfilter_row(row[0], row + 1, above, place, width);
            above = place;
            row += width + 1;
            place += width;
        }
        Py_END_ALLOW_THREADS;
        if (!ok) why = zeros ? "no such filter" : "out of memory";
        free(zeros);
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    if (why) {
        PyErr_SetString(PyExc_ValueError, why);
        return NULL;
    }
    Py_RETURN_NONE;
}

/* Counts values. Runs are counted by words; neighbours that are equal would else wait for each other,
   therefore four tables. */
static void count(const uint8_t *values, int64_t *total, Py_ssize_t n) {
    int64_t counts[4][256] = {{0}};
    Py_ssize_t i = 0;
    for (; i + WORD <= n; i += WORD) {
        if (word(values + i) == repeated(values[i]))
            counts[0][values[i]] += WORD;
        else
            for (int k = 0; k < WORD; k++) counts[k % 4][values[i + k]]++;
    }
    for (; i < n; i++) counts[0][values[i]]++;
    for (int v = 0; v < 256; v++)
        total[v] = counts[0][v] + counts[1][v] + counts[2][v] + counts[3][v];
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

/* Maps n values by a table of 16 bits; the bits of all entries that occur. */
static unsigned look_up(const uint8_t *restrict value, uint8_t *restrict place,
                        const uint16_t *restrict table, Py_ssize_t n) {
    unsigned found = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        unsigned entry = table[value[i]];
        found |= entry;
        place[i] = entry;
    }
    return found;
}

static PyObject *py_look_up(PyObject *self, PyObject *args) {
    Py_buffer values, out, table;
    PyObject *from, *to;
    if (!PyArg_ParseTuple(args, "OOy*", &from, &to, &table)) return NULL;
    if (!get(from, &values, to, &out, PyBUF_WRITABLE)) {
        PyBuffer_Release(&table);
        return NULL;
    }
    unsigned found = 0;
    int ok = table.len == 256 * 2 && values.len == out.len;
    if (ok) {
        Py_BEGIN_ALLOW_THREADS;
        found = look_up(values.buf, out.buf, table.buf, out.len);
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_SetString(PyExc_ValueError, "not two arrays of one size, and a table of 256 numbers");
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    PyBuffer_Release(&table);
    return ok ? PyBool_FromLong(found <= UINT8_MAX) : NULL;
}

/* Whether indices lie below n. */
static int below(const int64_t *indices, Py_ssize_t count, Py_ssize_t n) {
    int ok = 1;
    for (Py_ssize_t i = 0; i < count; i++) ok &= (uint64_t)indices[i] < (uint64_t)n;
    return ok;
}

static PyObject *py_gather(PyObject *self, PyObject *args) {
    Py_buffer values, out, rows, columns;
    PyObject *from, *to;
    if (!PyArg_ParseTuple(args, "OOy*y*", &from, &to, &rows, &columns)) return NULL;
    if (!get(from, &values, to, &out, PyBUF_WRITABLE)) {
        PyBuffer_Release(&rows);
        PyBuffer_Release(&columns);
        return NULL;
    }
    const int64_t *row = rows.buf, *column = columns.buf;
    int ok = values.ndim == 2 && out.ndim == 2 && rows.len == out.shape[0] * 8 &&
             columns.len == out.shape[1] * 8 && below(row, out.shape[0], values.shape[0]) &&
             below(column, out.shape[1], values.shape[1]);
    if (ok) {
        Py_ssize_t height = out.shape[0], width = out.shape[1], length = values.shape[1];
        Py_BEGIN_ALLOW_THREADS;
        uint8_t *place = out.buf;
        for (Py_ssize_t y = 0; y < height; y++, place += width) {
            const uint8_t *line = (const uint8_t *)values.buf + row[y] * length;
            if (y && row[y] == row[y - 1])
                memcpy(place, place - width, width);
            else
                for (Py_ssize_t x = 0; x < width; x++) place[x] = line[column[x]];
        }
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_SetString(PyExc_ValueError, "not indices of [H, W] for each row and column of [h, w]");
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    PyBuffer_Release(&rows);
    PyBuffer_Release(&columns);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

/* Counts the values at rows and columns, each as often as it is there. Neighbours that are equal would
   wait for each other, therefore four tables. */
static void count_at(const uint8_t *values, Py_ssize_t length, int64_t *total, const int64_t *row,
                     Py_ssize_t height, const int64_t *column, Py_ssize_t width) {
    int64_t counts[4][256] = {{0}};
    for (Py_ssize_t y = 0, next; y < height; y = next) {
        for (next = y + 1; next < height && row[next] == row[y];) next++;
        const uint8_t *line = values + row[y] * length;
        int64_t times = next - y;
        Py_ssize_t x = 0;
        for (; x + 4 <= width; x += 4)
            for (int k = 0; k < 4; k++) counts[k][line[column[x + k]]] += times;
        for (; x < width; x++) counts[0][line[column[x]]] += times;
    }
    for (int v = 0; v < 256; v++)
        total[v] = counts[0][v] + counts[1][v] + counts[2][v] + counts[3][v];
}

static PyObject *py_count_at(PyObject *self, PyObject *args) {
    Py_buffer values, out, rows, columns;
    PyObject *from, *to;
    if (!PyArg_ParseTuple(args, "OOy*y*", &from, &to, &rows, &columns)) return NULL;
    int ok = !PyObject_GetBuffer(from, &values, PyBUF_ND);
    if (ok && PyObject_GetBuffer(to, &out, PyBUF_ND | PyBUF_WRITABLE)) {
        PyBuffer_Release(&values);
        ok = 0;
    }
    if (!ok) {
        PyBuffer_Release(&rows);
        PyBuffer_Release(&columns);
        return NULL;
    }
    Py_ssize_t height = rows.len / 8, width = columns.len / 8;
    ok = values.ndim == 2 && values.itemsize == 1 && out.itemsize == 8 && out.len == 256 * 8 &&
         below(rows.buf, height, values.shape[0]) && below(columns.buf, width, values.shape[1]);
    if (ok) {
        Py_BEGIN_ALLOW_THREADS;
        count_at(values.buf, values.shape[1], out.buf, rows.buf, height, columns.buf, width);
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_SetString(PyExc_ValueError, "not bytes [H, W], 256 numbers of 64 bits, and indices");
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    PyBuffer_Release(&rows);
    PyBuffer_Release(&columns);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"unfilter", py_unfilter, METH_VARARGS,
     "unfilter(bytes [H, W + 1], each row after the number of its filter, out uint8 [H, W])"},
    {"count", py_count, METH_VARARGS, "count(uint8, out int64 [256])"},
    {"look_up", py_look_up, METH_VARARGS,
     "look_up(uint8, out uint8 of that size, table: bytes of uint16 [256]) -> whether all are bytes"},
    {"gather", py_gather, METH_VARARGS,
     "gather(uint8 [H, W], out uint8 [h, w], rows: bytes of int64 [h], columns: of int64 [w])"},
    {"count_at", py_count_at, METH_VARARGS,
     "count_at(uint8 [H, W], out int64 [256], rows: bytes of int64, columns: bytes of int64)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_labels", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__labels(void) {
    return PyModule_Create(&module);
}
