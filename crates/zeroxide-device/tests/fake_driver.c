/* A driver for tests: it has the functions that zeroxide uses of NVIDIA's, on "devices" whose memory is the host's.
 *
 * Nothing runs before somebody waits for it: copies see the bytes that are there then, and what a download fills holds
 * others until then. Every call that needs a context fails without one. What is done is written to a log.
 *
 * Built with -DVERSION=..., -DDEVICES=..., -DWITHOUT_REGISTER, -DWITHOUT_PARAMETER_INFO it is another driver.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef VERSION
#define VERSION 13000
#endif
#ifndef DEVICES
#define DEVICES 2
#endif
#ifndef CAPABILITY
#define CAPABILITY 90
#endif
#define MANY 4096
#define FREE ((size_t)1 << 30)
#define POISON 0xA5
#define INVALID_VALUE 1
#define OUT_OF_MEMORY 2
#define INVALID_DEVICE 101
#define INVALID_IMAGE 200
#define INVALID_CONTEXT 201
#define INVALID_HANDLE 400
#define NOT_FOUND 500
#define NOT_READY 600
#define ALREADY_REGISTERED 712
#define CONTEXT 0xC0DE00

typedef uint64_t handle;
enum kind { COPY, WAIT, KERNEL };
struct op { enum kind kind; void *to; const void *from; size_t bytes; handle stream; size_t point; };
struct stream { int alive; size_t given, done; struct op *ops; };
struct event { int alive; handle stream; size_t point; };
struct module { int alive; const unsigned char *image; size_t bytes; char entry[256]; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stream streams[MANY] = {[0] = {.alive = 1}};
static struct event events[MANY * 16];
static struct module modules[MANY];
static size_t stream_count = 1, event_count = 1, module_count = 1;
static size_t register_limit = SIZE_MAX, argument_bytes = 24;
static uintptr_t registered[MANY];
static int retained[DEVICES ? DEVICES : 1];
static char log_text[1 << 20];
static size_t log_bytes;
static char failing[64];
static int failing_code;
static __thread handle stack[16];
static __thread int depth;

static void note(const char *format, ...) {
    va_list list;
    va_start(list, format);
    size_t room = sizeof log_text - log_bytes;
    int wrote = vsnprintf(log_text + log_bytes, room, format, list);
    if (wrote > 0 && (size_t)wrote < room) log_bytes += wrote;
    va_end(list);
}

/* For tests: what was done, a call that fails from now on, limits, and what is left behind. */
const char *fake_log(void) { return log_text; }
void fake_clear(void) { log_bytes = 0; log_text[0] = 0; }
void fake_fail(const char *call, int code) { snprintf(failing, sizeof failing, "%s", call); failing_code = code; }
void fake_register_limit(size_t bytes) { register_limit = bytes; }
void fake_argument_bytes(size_t bytes) { argument_bytes = bytes; }
int fake_depth(void) { return depth; }
int fake_retained(int device) { return retained[device]; }
int fake_registered(void) { int n = 0; for (int i = 0; i < MANY; i++) n += registered[i] != 0; return n; }

static int fails(const char *call) { return strcmp(failing, call) == 0 ? failing_code : 0; }
#define BEGIN(name) if (fails(name)) return fails(name); if (!depth) return INVALID_CONTEXT

/* Does what a stream has to do up to a point; the lock is held. */
static void run_to(handle stream, size_t point) {
    struct stream *it = &streams[stream];
    while (it->done < point) {
        struct op op = it->ops[it->done];
        if (op.kind == COPY) memcpy(op.to, op.from, op.bytes);
        if (op.kind == WAIT) run_to(op.stream, op.point);
        it->done++;
    }
}

static int give(handle stream, struct op op) {
    if (stream >= stream_count || !streams[stream].alive) return INVALID_HANDLE;
    struct stream *it = &streams[stream];
    it->ops = realloc(it->ops, (it->given + 1) * sizeof op);
    it->ops[it->given++] = op;
    return 0;
}

int cuInit(unsigned flags) { (void)flags; return fails("cuInit"); }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = DEVICES; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return number < DEVICES ? 0 : INVALID_DEVICE; }
int cuDeviceGetName(char *text, int bytes, int device) { snprintf(text, bytes, "Fake %d", device); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
    (void)device;
    *value = which == 75 ? CAPABILITY / 10 : which == 76 ? CAPABILITY % 10 : which == 16 ? 4 : which == 97 ? 232448 : 1;
    return 0;
}

int cuGetErrorName(int code, const char **text) {
    *text = code == INVALID_VALUE        ? "CUDA_ERROR_INVALID_VALUE"
            : code == OUT_OF_MEMORY      ? "CUDA_ERROR_OUT_OF_MEMORY"
            : code == INVALID_IMAGE      ? "CUDA_ERROR_INVALID_IMAGE"
            : code == INVALID_CONTEXT    ? "CUDA_ERROR_INVALID_CONTEXT"
            : code == INVALID_HANDLE     ? "CUDA_ERROR_INVALID_HANDLE"
            : code == ALREADY_REGISTERED ? "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
            : code == 719                ? "CUDA_ERROR_LAUNCH_FAILED"
                                         : NULL;
    return *text ? 0 : INVALID_VALUE;
}
int cuGetErrorString(int code, const char **text) {
    *text = code == 719 ? "unspecified launch failure" : "said by the fake";
    return 0;
}

int cuDevicePrimaryCtxRetain(handle *context, int device) {
    *context = CONTEXT + device;
    retained[device]++;
    note("retain %d\n", device);
    return fails("cuDevicePrimaryCtxRetain");
}
int cuDevicePrimaryCtxRelease_v2(int device) { retained[device]--; note("release %d\n", device); return 0; }
int cuCtxPushCurrent_v2(handle context) { stack[depth++] = context; return 0; }
int cuCtxPopCurrent_v2(handle *context) {
    if (!depth) return INVALID_CONTEXT;
    *context = stack[--depth];
    return 0;
}

int cuCtxSynchronize(void) {
    BEGIN("cuCtxSynchronize");
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < stream_count; i++) run_to(i, streams[i].given);
    pthread_mutex_unlock(&lock);
    return 0;
}
int cuMemGetInfo_v2(size_t *free, size_t *total) { BEGIN("cuMemGetInfo"); *free = FREE; *total = 2 * FREE; return 0; }
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    BEGIN("cuMemAlloc");
    if (bytes > FREE) return OUT_OF_MEMORY;
    void *memory = malloc(bytes);
    memset(memory, POISON, bytes);
    *address = (uintptr_t)memory;
    return 0;
}
int cuMemFree_v2(uint64_t address) { BEGIN("cuMemFree"); free((void *)(uintptr_t)address); return 0; }
int cuMemHostUnregister(uintptr_t address) {
    BEGIN("cuMemHostUnregister");
    for (int i = 0; i < MANY; i++)
        if (registered[i] == address) { registered[i] = 0; note("unregister\n"); return 0; }
    return 713;
}
#ifndef WITHOUT_REGISTER
int cuMemHostRegister_v2(uintptr_t address, size_t bytes, unsigned flags) {
    BEGIN("cuMemHostRegister");
    if (bytes > register_limit) return OUT_OF_MEMORY;
    for (int i = 0; i < MANY; i++) if (registered[i] == address) return ALREADY_REGISTERED;
    for (int i = 0; i < MANY; i++) if (!registered[i]) { registered[i] = address; break; }
    note("register %zu %u\n", bytes, flags);
    return 0;
}
#endif

int cuMemcpyHtoDAsync_v2(uint64_t to, uintptr_t from, size_t bytes, handle stream) {
    BEGIN("cuMemcpyHtoDAsync");
    pthread_mutex_lock(&lock);
    int code = give(stream, (struct op){COPY, (void *)(uintptr_t)to, (void *)from, bytes, 0, 0});
    pthread_mutex_unlock(&lock);
    return code;
}
int cuMemcpyDtoHAsync_v2(uintptr_t to, uint64_t from, size_t bytes, handle stream) {
    BEGIN("cuMemcpyDtoHAsync");
    pthread_mutex_lock(&lock);
    memset((void *)to, POISON, bytes);
    int code = give(stream, (struct op){COPY, (void *)to, (void *)(uintptr_t)from, bytes, 0, 0});
    pthread_mutex_unlock(&lock);
    return code;
}

int cuStreamCreate(handle *stream, unsigned flags) {
    BEGIN("cuStreamCreate");
    pthread_mutex_lock(&lock);
    streams[stream_count].alive = 1;
    *stream = stream_count++;
    pthread_mutex_unlock(&lock);
    note("stream %u\n", flags);
    return 0;
}
int cuStreamDestroy_v2(handle stream) { BEGIN("cuStreamDestroy"); streams[stream].alive = 0; return 0; }
int cuStreamSynchronize(handle stream) {
    BEGIN("cuStreamSynchronize");
    pthread_mutex_lock(&lock);
    run_to(stream, streams[stream].given);
    pthread_mutex_unlock(&lock);
    return 0;
}
int cuStreamWaitEvent(handle stream, handle event, unsigned flags) {
    BEGIN("cuStreamWaitEvent");
    (void)flags;
    pthread_mutex_lock(&lock);
    int code = give(stream, (struct op){WAIT, NULL, NULL, 0, events[event].stream, events[event].point});
    pthread_mutex_unlock(&lock);
    return code;
}

int cuEventCreate(handle *event, unsigned flags) {
    BEGIN("cuEventCreate");
    (void)flags;
    pthread_mutex_lock(&lock);
    events[event_count].alive = 1;
    *event = event_count++;
    pthread_mutex_unlock(&lock);
    return 0;
}
int cuEventDestroy_v2(handle event) { BEGIN("cuEventDestroy"); events[event].alive = 0; return 0; }
int cuEventRecord(handle event, handle stream) {
    BEGIN("cuEventRecord");
    if (!events[event].alive) return INVALID_HANDLE;
    events[event].stream = stream;
    events[event].point = streams[stream].given;
    return 0;
}
int cuEventQuery(handle event) {
    BEGIN("cuEventQuery");
    return streams[events[event].stream].done >= events[event].point ? 0 : NOT_READY;
}
int cuEventSynchronize(handle event) {
    BEGIN("cuEventSynchronize");
    pthread_mutex_lock(&lock);
    run_to(events[event].stream, events[event].point);
    pthread_mutex_unlock(&lock);
    return 0;
}

/* The image is an ELF file of 64 bits: its table of sections ends it, or its table of segments. */
int cuModuleLoadData(handle *module, const void *image) {
    BEGIN("cuModuleLoadData");
    const unsigned char *bytes = image;
    if (memcmp(bytes, "\177ELF", 4)) return INVALID_IMAGE;
    uint64_t start[2];
    uint16_t sizes[4];
    memcpy(start, bytes + 32, 16);
    memcpy(sizes, bytes + 54, 8);
    size_t first = start[0] + (size_t)sizes[0] * sizes[1], second = start[1] + (size_t)sizes[2] * sizes[3];
    size_t length = first > second ? first : second;
    unsigned char *copy = malloc(length);
    memcpy(copy, bytes, length);
    modules[module_count] = (struct module){.alive = 1, .image = copy, .bytes = length};
    note("load %zu\n", length);
    *module = module_count++;
    return 0;
}
int cuModuleUnload(handle module) { BEGIN("cuModuleUnload"); modules[module].alive = 0; note("unload\n"); return 0; }
int cuModuleGetFunction(handle *kernel, handle module, const char *entry) {
    BEGIN("cuModuleGetFunction");
    char section[300];
    int length = snprintf(section, sizeof section, ".text.%s", entry);
    if (!memmem(modules[module].image, modules[module].bytes, section, length + 1)) return NOT_FOUND;
    snprintf(modules[module].entry, sizeof modules[module].entry, "%s", entry);
    *kernel = module;
    return 0;
}
int cuFuncGetAttribute(int *value, int which, handle kernel) {
    BEGIN("cuFuncGetAttribute");
    (void)kernel;
    *value = which == 4 ? 32 : 0;
    return 0;
}
int cuFuncSetAttribute(handle kernel, int which, int value) {
    BEGIN("cuFuncSetAttribute");
    (void)kernel;
    note("set %d %d\n", which, value);
    return value > 232448 ? INVALID_VALUE : 0;
}
#ifndef WITHOUT_PARAMETER_INFO
int cuFuncGetParamInfo(handle kernel, size_t index, size_t *offset, size_t *bytes) {
    BEGIN("cuFuncGetParamInfo");
    (void)kernel;
    if (index > 0) return INVALID_VALUE;
    *offset = 0;
    *bytes = argument_bytes;
    return 0;
}
#endif
int cuLaunchKernel(handle kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, handle stream, void **parameters, void **extra) {
    BEGIN("cuLaunchKernel");
    if (parameters || !extra || (uintptr_t)extra[0] != 1 || (uintptr_t)extra[2] != 2 || extra[4]) return INVALID_VALUE;
    if (bx > 1024 || !gx || gy != 1 || gz != 1 || by != 1 || bz != 1) return INVALID_VALUE;
    const unsigned char *argument = extra[1];
    size_t bytes = *(size_t *)extra[3];
    pthread_mutex_lock(&lock);
    int code = give(stream, (struct op){KERNEL, NULL, NULL, 0, 0, 0});
    pthread_mutex_unlock(&lock);
    if (code) return code;
    note("launch %s %u %u %u %llu %llx ", modules[kernel].entry, gx, bx, shared, (unsigned long long)stream,
         (unsigned long long)stack[depth - 1]);
    for (size_t i = 0; i < bytes; i++) note("%02x", argument[i]);
    note("\n");
    return 0;
}
