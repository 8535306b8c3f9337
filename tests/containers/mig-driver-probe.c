/* mig-driver-probe: loads the driver's libraries by the names that programs use, says which files they are, and lists the
 * slices that NVML shows. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>

static void *load(const char *name)
{
    void *library = dlopen(name, RTLD_NOW);
    struct link_map *map = NULL;
    const char *text;
    if (!library) {
        printf("%s: %s\n", name, dlerror());
        return NULL;
    }
    dlinfo(library, RTLD_DI_LINKMAP, &map);
    text = dlsym(library, "nvml_sim_file");
    printf("%s is %s%s%s\n", name, map ? map->l_name : "?", text ? ", which says: " : "", text ? text : "");
    return library;
}

int main(void)
{
    typedef unsigned (*init_t)(void);
    typedef unsigned (*count_t)(unsigned *);
    typedef unsigned (*by_index_t)(unsigned, void **);
    typedef unsigned (*mig_t)(void *, unsigned, void **);
    typedef unsigned (*uuid_t)(void *, char *, unsigned);
    void *cuda = load("libcuda.so.1"), *nvml = load("libnvidia-ml.so.1"), *gpu, *mig;
    unsigned gpus = 0, at, index;
    char uuid[96];
    if (!cuda || !nvml)
        return 1;
    if (((init_t)dlsym(nvml, "nvmlInit_v2"))() || ((count_t)dlsym(nvml, "nvmlDeviceGetCount_v2"))(&gpus)) {
        printf("NVML does not start\n");
        return 1;
    }
    for (at = 0; at < gpus; at++) {
        if (((by_index_t)dlsym(nvml, "nvmlDeviceGetHandleByIndex_v2"))(at, &gpu))
            continue;
        for (index = 0; index < 8; index++) {
            if (((mig_t)dlsym(nvml, "nvmlDeviceGetMigDeviceHandleByIndex"))(gpu, index, &mig))
                continue;
            ((uuid_t)dlsym(nvml, "nvmlDeviceGetUUID"))(mig, uuid, sizeof uuid);
            printf("sees %s on GPU %u of %u\n", uuid, at, gpus);
        }
    }
    return 0;
}
