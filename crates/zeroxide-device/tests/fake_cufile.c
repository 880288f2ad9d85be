// cuFile for tests: what a probe calls of it, with the codes that it is built to return, and its rules about order.
// It logs where the library does. OPEN, REGISTER: what these calls return. HANGS: opening never ends, ABORTS: it ends the process.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#ifndef OPEN
#define OPEN 0
#endif
#ifndef REGISTER
#define REGISTER 0
#endif
#define INVALID_VALUE 5022
#define NOT_DIRECT 5020
#define CUDA_DRIVER 5011

typedef struct { int code, driver; } status;
typedef struct { int kind; union { int fd; void *other; } handle; const void *operations; } description;

static int opened, handles, compatible = 1;

int fake_opened(void) { return opened; }
int fake_handles(void) { return handles; }

#ifndef OLD
status cuFileSetParameterBool(int which, bool value) {
    if (which != 1 || opened) return (status){INVALID_VALUE, 0};
    compatible = value;
    return (status){0, 0};
}
#endif
status cuFileDriverOpen(void) {
    const char *log = getenv("CUFILE_LOGFILE_PATH");
    FILE *written = fopen(log ? log : "cufile.log", "w");
    if (written) fclose(written);
#ifdef HANGS
    for (;;) pause();
#endif
#ifdef ABORTS
    fputs("cuFile: something is very wrong\n", stderr);
    abort();
#endif
    // As the library does: in its compatible mode everything seems to be there.
    if (compatible || OPEN == 0) {
        opened++;
        return (status){0, 0};
    }
    return (status){OPEN, OPEN == CUDA_DRIVER ? 999 : 0};
}
status cuFileDriverClose_v2(void) {
    opened--;
    return (status){0, 0};
}
status cuFileHandleRegister(void **handle, const description *file) {
    if (!opened || file->kind != 1 || file->operations) return (status){INVALID_VALUE, 0};
    int flags = fcntl(file->handle.fd, F_GETFL);
    if (flags < 0 || !(flags & O_DIRECT)) return (status){NOT_DIRECT, 0};
    if (REGISTER) return (status){REGISTER, 0};
    handles++;
    *handle = &handles;
    return (status){0, 0};
}
void cuFileHandleDeregister(void *handle) { handles -= handle == &handles; }
