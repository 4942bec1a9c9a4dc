/* Stand-in for the CUDA runtime that the host code of a CuTe DSL program resolves.
 *
 * The host code of a compiled CuTe DSL program calls the CUDA runtime through a small set of forwarding symbols
 * (_cudaLibraryLoadData, _cudaLaunchKernelEx, ...), which NVIDIA's libcute_dsl_runtime.so defines. This library defines
 * the same symbols and hands the ones that matter to Python callbacks. All decisions are taken in Python (runtime.py,
 * capture.py); nothing here touches memory other than what the caller passed for results.
 *
 * A callback returns 0, or a CUDA error code after it stored the Python exception that says why. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

/* Raised when a signature below or the callback table changes: runtime.py refuses a library with another number. */
#define INTERFACE_VERSION 3

enum { SUCCESS = 0, ERROR_MEMORY_ALLOCATION = 2, ERROR_INITIALIZATION = 3, ERROR_INVALID_HANDLE = 400 };

typedef struct { uint32_t x, y, z; } dim3_t;
typedef struct { uint32_t id; uint32_t padding; uint32_t value[16]; } launch_attribute_t; /* cudaLaunchAttribute: 72 bytes */
typedef struct {
    dim3_t grid, block;
    size_t dynamic_shared_bytes;
    void *stream;
    const launch_attribute_t *attributes;
    uint32_t attribute_count;
} launch_config_t; /* cudaLaunchConfig_t */

typedef struct {
    int data_type;
    uint32_t rank;
    void *address;
    const uint64_t *sizes, *strides;
    const uint32_t *box, *steps;
    int interleave, swizzle, promotion, fill;
} tensor_map_t; /* the arguments of cuTensorMapEncodeTiled */

typedef struct {
    int (*library_load)(void **library, const void *image);
    int (*library_get_kernel)(void **kernel, void *library, const char *name);
    int (*device_attribute)(int *value, int attribute);
    int (*kernel_get_attribute)(int *value, int attribute, void *kernel);
    int (*kernel_set_attribute)(void *kernel, int attribute, int value);
    int (*occupancy)(int *ctas, void *kernel, int threads, size_t dynamic_shared_bytes);
    int (*launch)(void *kernel, const launch_config_t *config, void **arguments);
    int (*allocate)(void **memory, size_t bytes);
    int (*release)(void *memory);
    int (*copy)(void *target, const void *source, size_t bytes);
    int (*fill)(void *memory, int value, size_t bytes);
    int (*encode_tensor_map)(void *map, const tensor_map_t *wanted);
    int (*unsupported)(const char *symbol);
} callbacks_t;

static callbacks_t callbacks;
static int bound;

EXPORT int cute_attn_runtime_version(void) { return INTERFACE_VERSION; }

EXPORT void cute_attn_runtime_bind(const callbacks_t *table) {
    callbacks = *table;
    bound = 1;
}

#define FORWARD(name, ...) (bound ? callbacks.name(__VA_ARGS__) : ERROR_INITIALIZATION)

/* ---- libraries and kernels ---- */

EXPORT int _cudaLibraryLoadData(void **library, const void *image, void *jit_options, void *jit_values, unsigned jit_count,
                                void *options, void *values, unsigned count) {
    (void)jit_options, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    return FORWARD(library_load, library, image);
}

EXPORT int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    return FORWARD(library_get_kernel, kernel, library, name);
}

/* Libraries are interned in Python by their content and live as long as the process, so unloading one is a no-op; host
 * code may unload during interpreter shutdown, when no callback can run. */
EXPORT int _cudaLibraryUnload(void *library) {
    (void)library;
    return SUCCESS;
}

EXPORT int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
    (void)device;
    return FORWARD(kernel_get_attribute, value, attribute, kernel);
}

EXPORT int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
    (void)device;
    return FORWARD(kernel_set_attribute, kernel, attribute, value);
}

EXPORT int _cudaFuncSetAttribute(void *kernel, int attribute, int value) {
    return FORWARD(kernel_set_attribute, kernel, attribute, value);
}

/* ---- one device, number 0 ---- */

EXPORT int _cudaGetDevice(int *device) {
    *device = 0;
    return SUCCESS;
}

EXPORT int _cudaSetDevice(int device) {
    enum { ERROR_INVALID_DEVICE = 101 };
    return device == 0 ? SUCCESS : ERROR_INVALID_DEVICE;
}

EXPORT int _cudaGetDeviceCount(int *count) {
    *count = 1;
    return SUCCESS;
}

EXPORT int _cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return SUCCESS;
}

EXPORT int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    return FORWARD(device_attribute, value, attribute);
}

/* ---- launches: each has finished when the call returns, so there is nothing to wait for ---- */

EXPORT int _cudaLaunchKernelEx(const launch_config_t *config, void *kernel, void **arguments) {
    return FORWARD(launch, kernel, config, arguments);
}

EXPORT int _cudaLaunchKernel(void *kernel, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, uint32_t block_x,
                             uint32_t block_y, uint32_t block_z, void **arguments, size_t shared_bytes, void *stream) {
    launch_config_t config = {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, NULL, 0};
    return FORWARD(launch, kernel, &config, arguments);
}

EXPORT int _cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *ctas, void *kernel, int threads, size_t shared_bytes) {
    return FORWARD(occupancy, ctas, kernel, threads, shared_bytes);
}

EXPORT int _cudaStreamSynchronize(void *stream) {
    (void)stream;
    return SUCCESS;
}

EXPORT int _cudaDeviceSynchronize(void) { return SUCCESS; }

/* A stream is a number: all of them are in order, because every launch is. */
EXPORT int _cudaStreamCreate(void **stream) {
    static intptr_t count;
    *stream = (void *)(0x10000 + __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED)); /* above the numbers CUDA reserves */
    return SUCCESS;
}

EXPORT int _cudaStreamDestroy(void *stream) {
    (void)stream;
    return SUCCESS;
}

EXPORT int _cudaStreamWaitEvent(void *stream, void *event) {
    (void)stream, (void)event;
    return SUCCESS;
}

/* An event keeps the time of this machine: programs that print a kernel's time print the emulator's. */
EXPORT int _cudaEventCreate(void **event) {
    *event = calloc(1, sizeof(struct timespec));
    return *event ? SUCCESS : ERROR_MEMORY_ALLOCATION;
}

EXPORT int _cudaEventDestroy(void *event) {
    free(event);
    return SUCCESS;
}

EXPORT int _cudaEventRecord(void *event, void *stream) {
    (void)stream;
    return event && clock_gettime(CLOCK_MONOTONIC, event) == 0 ? SUCCESS : ERROR_INVALID_HANDLE;
}

EXPORT int _cudaEventElapsedTime(float *milliseconds, const struct timespec *start, const struct timespec *end) {
    if (!start || !end) return ERROR_INVALID_HANDLE;
    *milliseconds = (float)((double)(end->tv_sec - start->tv_sec) * 1e3 + (double)(end->tv_nsec - start->tv_nsec) / 1e6);
    return SUCCESS;
}

/* ---- device memory that the program allocates by itself ---- */

EXPORT int _cudaMalloc(void **memory, size_t bytes) { return FORWARD(allocate, memory, bytes); }

EXPORT int _cudaMallocAsync(void **memory, size_t bytes, void *stream) {
    (void)stream;
    return FORWARD(allocate, memory, bytes);
}

EXPORT int _cudaFree(void *memory) { return FORWARD(release, memory); }

EXPORT int _cudaFreeAsync(void *memory, void *stream) {
    (void)stream;
    return FORWARD(release, memory);
}

EXPORT int _cudaMemcpy(void *target, const void *source, size_t bytes, int kind) {
    (void)kind; /* one address space */
    return FORWARD(copy, target, source, bytes);
}

EXPORT int _cudaMemcpyAsync(void *target, const void *source, size_t bytes, int kind, void *stream) {
    (void)kind, (void)stream;
    return FORWARD(copy, target, source, bytes);
}

EXPORT int _cudaMemset(void *memory, int value, size_t bytes) { return FORWARD(fill, memory, value, bytes); }

EXPORT int _cudaMemsetAsync(void *memory, int value, size_t bytes, void *stream) {
    (void)stream;
    return FORWARD(fill, memory, value, bytes);
}

EXPORT int _cuTensorMapEncodeTiled(void *map, int data_type, uint32_t rank, void *address, const uint64_t *sizes,
                                   const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                                   int swizzle, int promotion, int fill) {
    tensor_map_t wanted = {data_type, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill};
    return FORWARD(encode_tensor_map, map, &wanted);
}

/* ---- what the TVM-FFI flavour of the host code adds ---- */

/* Loads the program's library on its first call. `state` is a word of the program, 0 before. Two threads may both get
 * here: libraries are interned, so both store the same handle. */
EXPORT int cuda_dialect_init_library_once(void **state, int (*init)(void **), int (*load_to_device)(void **, int),
                                          void (*set_error)(const char *kind, const char *message)) {
    void *library = __atomic_load_n(state, __ATOMIC_ACQUIRE);
    if (library) return SUCCESS;
    int error = init(&library);
    if (!error) error = load_to_device(&library, 0);
    if (error) {
        set_error("RuntimeError", "the emulator could not load the program's CUDA library");
        return error;
    }
    __atomic_store_n(state, library, __ATOMIC_RELEASE);
    return SUCCESS;
}

EXPORT void cuda_dialect_unload_library_once(void **state) { *state = NULL; }

EXPORT const char *cuda_dialect_get_error_name(int error) { return error ? "emulator error" : "cudaSuccess"; }

/* The classic host code returns the error code as well; Python raises the stored exception then. */
EXPORT void cuda_dialect_assert_success(int error) { (void)error; }
EXPORT void cuda_dialect_print_on_error(int error) { (void)error; }

typedef void (*set_error_parts_t)(const char *kind, const char **parts, int count);

EXPORT void CuteDSLRT_TVMFFISetRaisedCudaError(set_error_parts_t set_error, int error) {
    const char *parts[] = {"the emulator refused a call of the CUDA runtime"};
    (void)error;
    set_error("RuntimeError", parts, 1);
}

/* Called by programs compiled with launch checks, before the launch, with the sizes and the name of the limit. */
EXPORT void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(set_error_parts_t set_error, int grid_x, int grid_y, int grid_z,
                                                     int block_x, int block_y, int block_z, int threads,
                                                     int64_t shared_bytes, int device, int max_threads,
                                                     int max_block_x, int max_block_y, int max_block_z,
                                                     int max_grid_x, int max_grid_y, int max_grid_z, int max_shared,
                                                     int max_shared_optin, const char *violation) {
    const char *parts[] = {"launch refused before it started: ", violation};
    (void)grid_x, (void)grid_y, (void)grid_z, (void)block_x, (void)block_y, (void)block_z, (void)threads;
    (void)shared_bytes, (void)device, (void)max_threads, (void)max_block_x, (void)max_block_y, (void)max_block_z;
    (void)max_grid_x, (void)max_grid_y, (void)max_grid_z, (void)max_shared, (void)max_shared_optin;
    set_error("RuntimeError", parts, 2);
}

/* ---- the rest of the symbols: refused by name ---- */

#define REFUSED(symbol) \
    EXPORT int symbol(void) { return FORWARD(unsupported, #symbol); }

REFUSED(_cuLibraryGetGlobal)
REFUSED(_cuLibraryGetKernel)
REFUSED(_cuLibraryGetKernelCount)
REFUSED(_cuLibraryGetManaged)
REFUSED(_cuLibraryGetModule)
REFUSED(_cuLibraryGetUnifiedFunction)
REFUSED(_cuLibraryLoadData)
REFUSED(_cuLibraryLoadFromFile)
REFUSED(_cuLibraryUnload)
REFUSED(_cudaFreeHost)
REFUSED(_cudaGetDeviceProperties)
REFUSED(_cudaGraphDestroy)
REFUSED(_cudaGraphExecDestroy)
REFUSED(_cudaGraphInstantiate)
REFUSED(_cudaGraphLaunch)
REFUSED(_cudaLibraryGetGlobal)
REFUSED(_cudaLibraryGetKernelCount)
REFUSED(_cudaLibraryGetManaged)
REFUSED(_cudaLibraryGetUnifiedFunction)
REFUSED(_cudaLibraryLoadFromFile)
REFUSED(_cudaMallocHost)
REFUSED(_cudaMallocManaged)
REFUSED(_cudaProfilerStart)
REFUSED(_cudaProfilerStop)
REFUSED(_cudaStreamAddCallback)
REFUSED(_cudaStreamBeginCapture)
REFUSED(_cudaStreamEndCapture)
REFUSED(CuteDSLRT_Function_Run)
REFUSED(CuteDSLRT_Module_Create_From_Bytes)
REFUSED(CuteDSLRT_Module_Destroy)
REFUSED(CuteDSLRT_Module_Get_Function)
