/* Has a Vulkan device look like another: loaded before libvulkan by LD_PRELOAD, it answers in its place.

   OTHER_LIMIT  bytes that can be allocated in all, whatever the device says it has
   OTHER_HEAP   bytes of memory that the device says it has
   OTHER_TYPE   1 an integrated GPU, 2 a discrete one (VkPhysicalDeviceType)
   OTHER_RANGE  bytes that a shader may see of a buffer (maxStorageBufferRange)
   OTHER_PEAK   a file that is told at the end how many bytes were allocated at most
   OTHER_KEEPS  buffers are never destroyed: Mesa 22.3's device still touches those that were */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vulkan/vulkan.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { VkDeviceMemory memory; VkDeviceSize size; } held[1 << 16];
static size_t holding;
static VkDeviceSize total, peak;

/* What stands behind each function that is answered here; filled when somebody asks for it. */
enum { ALLOCATE, FREE, DESTROY, PROPERTIES, PROPERTIES2, MEMORY, MEMORY2, DEVICE_PROC, REAL_COUNT };
static PFN_vkVoidFunction real[REAL_COUNT];

static VkDeviceSize setting(const char *name) {
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 10) : 0;
}

static VkResult allocate(VkDevice device, const VkMemoryAllocateInfo *info, const VkAllocationCallbacks *callbacks,
                         VkDeviceMemory *memory) {
    VkDeviceSize limit = setting("OTHER_LIMIT");
    pthread_mutex_lock(&lock);
    VkResult result = VK_ERROR_OUT_OF_DEVICE_MEMORY;
    if (holding < COUNT(held) && (!limit || total + info->allocationSize <= limit))
        result = ((PFN_vkAllocateMemory)real[ALLOCATE])(device, info, callbacks, memory);
    if (result == VK_SUCCESS) {
        held[holding].memory = *memory;
        held[holding++].size = info->allocationSize;
        total += info->allocationSize;
        peak = total > peak ? total : peak;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static void release(VkDevice device, VkDeviceMemory memory, const VkAllocationCallbacks *callbacks) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < holding; i++)
        if (held[i].memory == memory) {
            total -= held[i].size;
            held[i] = held[--holding];
            break;
        }
    pthread_mutex_unlock(&lock);
    ((PFN_vkFreeMemory)real[FREE])(device, memory, callbacks);
}

static void destroy(VkDevice device, VkBuffer buffer, const VkAllocationCallbacks *callbacks) {
    if (!setting("OTHER_KEEPS"))
        ((PFN_vkDestroyBuffer)real[DESTROY])(device, buffer, callbacks);
}

static void change_properties(VkPhysicalDeviceProperties *found) {
    if (setting("OTHER_TYPE"))
        found->deviceType = (VkPhysicalDeviceType)setting("OTHER_TYPE");
    if (setting("OTHER_RANGE"))
        found->limits.maxStorageBufferRange = (uint32_t)setting("OTHER_RANGE");
}

static void properties(VkPhysicalDevice device, VkPhysicalDeviceProperties *found) {
    ((PFN_vkGetPhysicalDeviceProperties)real[PROPERTIES])(device, found);
    change_properties(found);
}

static void properties2(VkPhysicalDevice device, VkPhysicalDeviceProperties2 *found) {
    ((PFN_vkGetPhysicalDeviceProperties2)real[PROPERTIES2])(device, found);
    change_properties(&found->properties);
}

static void change_memory(VkPhysicalDeviceMemoryProperties *found) {
    if (setting("OTHER_HEAP"))
        found->memoryHeaps[0].size = setting("OTHER_HEAP");
}

static void memory(VkPhysicalDevice device, VkPhysicalDeviceMemoryProperties *found) {
    ((PFN_vkGetPhysicalDeviceMemoryProperties)real[MEMORY])(device, found);
    change_memory(found);
}

static void memory2(VkPhysicalDevice device, VkPhysicalDeviceMemoryProperties2 *found) {
    ((PFN_vkGetPhysicalDeviceMemoryProperties2)real[MEMORY2])(device, found);
    change_memory(&found->memoryProperties);
    for (VkBaseOutStructure *next = found->pNext; next; next = next->pNext)
        if (setting("OTHER_HEAP") && next->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT) {
            VkPhysicalDeviceMemoryBudgetPropertiesEXT *budget = (void *)next;
            budget->heapBudget[0] = setting("OTHER_HEAP");
            budget->heapUsage[0] = 0;
        }
}

static PFN_vkVoidFunction device_proc(VkDevice device, const char *name);

static const struct { const char *name; int behind; PFN_vkVoidFunction ours; } answered[] = {
    {"vkAllocateMemory", ALLOCATE, (PFN_vkVoidFunction)allocate},
    {"vkFreeMemory", FREE, (PFN_vkVoidFunction)release},
    {"vkDestroyBuffer", DESTROY, (PFN_vkVoidFunction)destroy},
    {"vkGetPhysicalDeviceProperties", PROPERTIES, (PFN_vkVoidFunction)properties},
    {"vkGetPhysicalDeviceProperties2", PROPERTIES2, (PFN_vkVoidFunction)properties2},
    {"vkGetPhysicalDeviceProperties2KHR", PROPERTIES2, (PFN_vkVoidFunction)properties2},
    {"vkGetPhysicalDeviceMemoryProperties", MEMORY, (PFN_vkVoidFunction)memory},
    {"vkGetPhysicalDeviceMemoryProperties2", MEMORY2, (PFN_vkVoidFunction)memory2},
    {"vkGetPhysicalDeviceMemoryProperties2KHR", MEMORY2, (PFN_vkVoidFunction)memory2},
    {"vkGetDeviceProcAddr", DEVICE_PROC, (PFN_vkVoidFunction)device_proc},
};

/* Ours where it is answered here, with what was found behind it. */
static PFN_vkVoidFunction answer(const char *name, PFN_vkVoidFunction found) {
    for (size_t i = 0; found && i < COUNT(answered); i++)
        if (!strcmp(name, answered[i].name)) {
            real[answered[i].behind] = found;
            return answered[i].ours;
        }
    return found;
}

static PFN_vkVoidFunction device_proc(VkDevice device, const char *name) {
    return answer(name, ((PFN_vkGetDeviceProcAddr)real[DEVICE_PROC])(device, name));
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL vkGetInstanceProcAddr(VkInstance instance, const char *name) {
    static PFN_vkGetInstanceProcAddr next;
    if (!next)
        next = (PFN_vkGetInstanceProcAddr)dlsym(dlopen("libvulkan.so.1", RTLD_NOW), "vkGetInstanceProcAddr");
    return strcmp(name, "vkGetInstanceProcAddr") ? answer(name, next(instance, name))
                                                 : (PFN_vkVoidFunction)vkGetInstanceProcAddr;
}

__attribute__((destructor)) static void report(void) {
    FILE *file = getenv("OTHER_PEAK") ? fopen(getenv("OTHER_PEAK"), "w") : NULL;
    if (file) {
        fprintf(file, "%llu\n", (unsigned long long)peak);
        fclose(file);
    }
}
