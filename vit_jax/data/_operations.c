/* Operations on images uint8 [H, W, 3]: looks values up in tables, counts them, blends colours with
   their grey and pixels with their neighbourhood.

   Pillow has them too, for pixels of 4 bytes: the copies to and fro take longer than these loops.
   All functions release the GIL, and raise ValueError. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__)
#define FAST __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define FAST
#endif

enum { LANES = 48, BLOCK = 256 }; /* bytes of 16 pixels; pixels whose channels are separated */

static void look_up(const uint8_t *restrict image, uint8_t *restrict out,
                    const uint8_t *restrict tables, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i += 3)
        for (int c = 0; c < 3; c++) out[i + c] = tables[c * 256 + image[i + c]];
}

/* Counts the values of each channel. Two tables: neighbours that are equal would wait for each
   other. */
static void count(const uint8_t *image, int64_t *total, Py_ssize_t n) {
    int64_t counts[6][256] = {{0}};
    Py_ssize_t i = 0;
    for (; i + 6 <= n; i += 6)
        for (int k = 0; k < 6; k++) counts[k][image[i + k]]++;
    for (; i < n; i++) counts[i % 3][image[i]]++;
    for (int c = 0; c < 3; c++)
        for (int v = 0; v < 256; v++) total[c * 256 + v] = counts[c][v] + counts[c + 3][v];
}

/* Finds the lowest and the highest value of each channel. */
FAST static void find_extrema(const uint8_t *image, uint8_t *low, uint8_t *high, Py_ssize_t n) {
    uint8_t least[LANES], most[LANES];
    memset(least, 255, LANES);
    memset(most, 0, LANES);
    Py_ssize_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int k = 0; k < LANES; k++) {
            uint8_t value = image[i + k];
            least[k] = value < least[k] ? value : least[k];
            most[k] = value > most[k] ? value : most[k];
        }
    }
    for (; i < n; i++) {
        if (image[i] < least[i % 3]) least[i % 3] = image[i];
        if (image[i] > most[i % 3]) most[i % 3] = image[i];
    }
    for (int k = 3; k < LANES; k++) {
        if (least[k] < least[k % 3]) least[k % 3] = least[k];
        if (most[k] > most[k % 3]) most[k % 3] = most[k];
    }
    memcpy(low, least, 3);
    memcpy(high, most, 3);
}

/* from + factor * (to - from), truncated, in float32 as Pillow's Image.blend. */
static inline uint8_t blend(int from, int to, float factor) {
    float value = from + factor * (to - from);
    value = value > 0 ? value : 0;
    return (int)(value < 255 ? value : 255);
}

/* Blends n pixels of separate channels with their grey values: weights w of red, green and blue and a
   constant, summed in float32 in this order, and truncated. */
FAST static void blend_channels(uint8_t *restrict red, uint8_t *restrict green,
                                uint8_t *restrict blue, int n, float factor, const float *w) {
    float of_red = w[0], of_green = w[1], of_blue = w[2], constant = w[3];
    for (int i = 0; i < n; i++) {
        float sum = of_red * red[i] + of_green * green[i] + of_blue * blue[i] + constant + 0.5f;
        sum = sum > 0 ? sum : 0;
        int grey = (int)(sum < 255 ? sum : 255);
        red[i] = blend(grey, red[i], factor);
        green[i] = blend(grey, green[i], factor);
        blue[i] = blend(grey, blue[i], factor);
    }
}

/* Blends n bytes of pixels with their grey values. Compilers vectorise separate channels alone. */
static void blend_grey(const uint8_t *restrict image, uint8_t *restrict out, Py_ssize_t n,
                       float factor, const float *w) {
    uint8_t channels[3][BLOCK] = {{0}};
    for (Py_ssize_t start = 0; start < n; start += 3 * BLOCK) {
        int count = n - start < 3 * BLOCK ? (int)(n - start) / 3 : BLOCK;
        for (int i = 0; i < count; i++)
            for (int c = 0; c < 3; c++) channels[c][i] = image[start + 3 * i + c];
        blend_channels(channels[0], channels[1], channels[2], BLOCK, factor, w);
        for (int i = 0; i < count; i++)
            for (int c = 0; c < 3; c++) out[start + 3 * i + c] = channels[c][i];
    }
}

/* Blends a row, without its first and last pixel, with the averages of 3 x 3 pixels: weight 5 of the
   centre, 1 of others, (sum + add) / 13. `line` has room for n numbers. */
FAST static void sharpen_row(const uint8_t *restrict above, const uint8_t *restrict row,
                             const uint8_t *restrict below, uint8_t *restrict out,
                             uint16_t *restrict line, Py_ssize_t n, float factor, int add) {
    for (Py_ssize_t i = 0; i < n; i++) line[i] = above[i] + row[i] + below[i];
    for (Py_ssize_t i = 3; i < n - 3; i++) {
        uint16_t sum = line[i - 3] + line[i] + line[i + 3] + 4 * row[i] + add;
        out[i] = blend((uint16_t)(sum / 13), row[i], factor);
    }
}

/* Sharpens [height, n bytes]; the border stays. 0 without memory. */
static int sharpen(const uint8_t *image, uint8_t *out, Py_ssize_t height, Py_ssize_t n, float factor,
                   int add) {
    uint16_t *line = malloc(n * sizeof *line);
    memcpy(out, image, height * n);
    for (Py_ssize_t y = 1; line && n > 6 && y < height - 1; y++) {
        const uint8_t *row = image + y * n;
        sharpen_row(row - n, row, row + n, out + y * n, line, n, factor, add);
    }
    free(line);
    return line != NULL;
}

/* Gets the buffers of an image and of one of its shape that is written, or of `size` bytes that are
   if it is not 0; else sets an exception and returns 0. */
static int get(PyObject *from, Py_buffer *image, PyObject *to, Py_buffer *out, Py_ssize_t size) {
    if (PyObject_GetBuffer(from, image, PyBUF_ND)) return 0;
    if (PyObject_GetBuffer(to, out, PyBUF_ND | PyBUF_WRITABLE)) {
        PyBuffer_Release(image);
        return 0;
    }
    int ok = image->ndim == 3 && image->itemsize == 1 && image->shape[2] == 3 && image->len > 0;
    if (size)
        ok = ok && out->len == size;
    else
        ok = ok && out->ndim == 3 && out->itemsize == 1 && image->buf != out->buf &&
             !memcmp(image->shape, out->shape, 3 * sizeof *image->shape);
    if (ok) return 1;
    PyBuffer_Release(image);
    PyBuffer_Release(out);
    PyErr_SetString(PyExc_ValueError, "not uint8 [H, W, 3], and an array to write of the right size");
    return 0;
}

static PyObject *done(Py_buffer *image, Py_buffer *out, int ok) {
    PyBuffer_Release(image);
    PyBuffer_Release(out);
    if (!ok) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_look_up(PyObject *self, PyObject *args) {
    Py_buffer image, out;
    PyObject *from, *to;
    const uint8_t *tables;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "OOy#", &from, &to, &tables, &size)) return NULL;
    if (size != 3 * 256) {
        PyErr_SetString(PyExc_ValueError, "not three tables of 256 bytes");
        return NULL;
    }
    if (!get(from, &image, to, &out, 0)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    look_up(image.buf, out.buf, tables, image.len);
    Py_END_ALLOW_THREADS;
    return done(&image, &out, 1);
}

static PyObject *py_count(PyObject *self, PyObject *args) {
    Py_buffer image, out;
    PyObject *from, *to;
    if (!PyArg_ParseTuple(args, "OO", &from, &to)) return NULL;
    if (!get(from, &image, to, &out, 3 * 256 * sizeof(int64_t))) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    count(image.buf, out.buf, image.len);
    Py_END_ALLOW_THREADS;
    return done(&image, &out, 1);
}

static PyObject *py_extrema(PyObject *self, PyObject *args) {
    Py_buffer image, out;
    PyObject *from, *to;
    if (!PyArg_ParseTuple(args, "OO", &from, &to)) return NULL;
    if (!get(from, &image, to, &out, 6)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    find_extrema(image.buf, out.buf, (uint8_t *)out.buf + 3, image.len);
    Py_END_ALLOW_THREADS;
    return done(&image, &out, 1);
}

static PyObject *py_blend_grey(PyObject *self, PyObject *args) {
    Py_buffer image, out;
    PyObject *from, *to;
    float factor, w[4];
    if (!PyArg_ParseTuple(args, "OOf(ffff)", &from, &to, &factor, w, w + 1, w + 2, w + 3)) return NULL;
    if (!get(from, &image, to, &out, 0)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    blend_grey(image.buf, out.buf, image.len, factor, w);
    Py_END_ALLOW_THREADS;
    return done(&image, &out, 1);
}

static PyObject *py_sharpen(PyObject *self, PyObject *args) {
    Py_buffer image, out;
    PyObject *from, *to;
    float factor;
    int add, ok;
    if (!PyArg_ParseTuple(args, "OOfi", &from, &to, &factor, &add)) return NULL;
    if (!get(from, &image, to, &out, 0)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    ok = sharpen(image.buf, out.buf, image.shape[0], image.shape[1] * 3, factor, add);
    Py_END_ALLOW_THREADS;
    return done(&image, &out, ok);
}

static PyMethodDef methods[] = {
    {"look_up", py_look_up, METH_VARARGS, "look_up(image, out, tables of the channels: 768 bytes)"},
    {"count", py_count, METH_VARARGS, "count(image, out int64 [3, 256])"},
    {"extrema", py_extrema, METH_VARARGS, "extrema(image, out uint8 [2, 3]: lowest, highest)"},
    {"blend_grey", py_blend_grey, METH_VARARGS,
     "blend_grey(image, out, factor, (red, green, blue, constant))"},
    {"sharpen", py_sharpen, METH_VARARGS, "sharpen(image, out, factor, added before division)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_operations", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__operations(void) {
    return PyModule_Create(&module);
}
