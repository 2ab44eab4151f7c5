/* A small libnvidia-ml for tests: GPUs whose every reading is a known function of time.
 *
 * Written from the public NVML API reference. Structures are laid out here as that reference and the C ABI lay them
 * out, so that pynvml's own layouts and version numbers are exercised against an independent declaration.
 *
 * The file named by FAKE_NVML_CONFIG is read at nvmlInit. One setting a line:
 *     num_gpus 8                     t0_monotonic_s 123.5 (origin of time; default: nvmlInit)
 *     init_error 9                   driver 570.86.15
 *     gpu <index|*> <key> <value>    see `set` below
 * lost_file and error_file name files: while they exist the GPU is lost, or its field calls fail.
 * A power of P watts from t=0 and Q watts from t=step gives the exact energy that a test can compute for itself.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef int nvmlReturn_t;
enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, NOT_FOUND = 6,
       LOST = 15, VERSION_MISMATCH = 25 };
enum { MAX_GPUS = 16, MAX_FIELDS = 64, MAX_PROCESSES = 8 };

typedef union { double d; unsigned int ui; unsigned long ul; unsigned long long ull; long long sll; int si;
                unsigned short us; } value_t;
typedef struct { unsigned int fieldId, scopeId; long long timestamp, latencyUsec; unsigned int valueType;
                 nvmlReturn_t nvmlReturn; value_t value; } field_value_t;
typedef struct { unsigned int pid; unsigned long long usedGpuMemory; unsigned int gpuInstanceId, computeInstanceId; } process_t;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int version; unsigned int sensorType; int temperature; } temperature_t;
typedef struct { unsigned int version, isSupportedDevice; } gpm_support_t;
typedef struct { char *shortName, *longName, *unit; } metric_info_t;
typedef struct { unsigned int metricId; nvmlReturn_t nvmlReturn; double value; metric_info_t info; } metric_t;
typedef struct { unsigned int version, numMetrics; void *sample1, *sample2; metric_t metrics[]; } metrics_get_t;
typedef struct { char busIdLegacy[16]; unsigned int domain, bus, device, pciDeviceId, pciSubSystemId; char busId[32]; } pci_t;

typedef struct {
    int index;
    char uuid[64], name[64], lost_file[256], error_file[256];
    double power_w, step_at_s, step_power_w, energy_period_ms, energy_offset_mj, lost_after_s;
    double throttled_share[5]; /* of time: sw power, sync boost, sw thermal, hw thermal, hw power brake */
    double pcie_bytes_per_s, nvlink_kib_per_s, pcie_offset_bytes, power_limit_w, sm_mhz, max_sm_mhz, temperature_c, degrees_per_s;
    double sm_active, occupancy, tensor, dram; /* percent */
    double memory_bytes, used_bytes, released_at_s, used_after_bytes;
    int energy_bits, pcie_bits, gpm, num_links, num_unsupported, unsupported[MAX_FIELDS], no_temperature_v, no_memory_v2, refuse_unknown;
    int num_processes; unsigned int pids[MAX_PROCESSES];
    int mig, ecc, util;
} gpu_t;

static gpu_t gpus[MAX_GPUS];
static int num_gpus = 1, ready = 0, init_error = 0;
static double t0 = 0;
static char driver[64] = "570.86.15";

static double monotonic_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}
static double now_s(void) { return monotonic_s() - t0; }

static void set(gpu_t *g, const char *key, const char *text) {
    double v = atof(text);
    struct { const char *name; double *at; } numbers[] = {
        {"power_w", &g->power_w}, {"step_at_s", &g->step_at_s}, {"step_power_w", &g->step_power_w},
        {"energy_period_ms", &g->energy_period_ms}, {"energy_offset_mj", &g->energy_offset_mj},
        {"lost_after_s", &g->lost_after_s}, {"pcie_bytes_per_s", &g->pcie_bytes_per_s},
        {"pcie_offset_bytes", &g->pcie_offset_bytes}, {"nvlink_kib_per_s", &g->nvlink_kib_per_s},
        {"power_limit_w", &g->power_limit_w}, {"sm_mhz", &g->sm_mhz}, {"max_sm_mhz", &g->max_sm_mhz},
        {"temperature_c", &g->temperature_c}, {"degrees_per_s", &g->degrees_per_s}, {"memory_bytes", &g->memory_bytes},
        {"used_bytes", &g->used_bytes}, {"released_at_s", &g->released_at_s}, {"used_after_bytes", &g->used_after_bytes},
        {"throttled_sw_power", &g->throttled_share[0]}, {"throttled_sync_boost", &g->throttled_share[1]},
        {"throttled_sw_thermal", &g->throttled_share[2]}, {"throttled_hw_thermal", &g->throttled_share[3]},
        {"throttled_hw_power", &g->throttled_share[4]}, {"sm_active", &g->sm_active}, {"tensor", &g->tensor},
        {"dram", &g->dram},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (!strcmp(key, numbers[i].name)) { *numbers[i].at = v; return; }
    struct { const char *name; int *at; } integers[] = {
        {"energy_bits", &g->energy_bits}, {"pcie_bits", &g->pcie_bits}, {"gpm", &g->gpm}, {"num_links", &g->num_links},
        {"no_temperature_v", &g->no_temperature_v}, {"no_memory_v2", &g->no_memory_v2}, {"mig", &g->mig},
        {"ecc", &g->ecc}, {"util", &g->util}, {"refuse_unknown", &g->refuse_unknown},
    };
    for (size_t i = 0; i < sizeof integers / sizeof integers[0]; i++)
        if (!strcmp(key, integers[i].name)) { *integers[i].at = (int)v; return; }
    if (!strcmp(key, "unsupported")) g->unsupported[g->num_unsupported++] = (int)v;
    else if (!strcmp(key, "process")) g->pids[g->num_processes++] = (unsigned int)v;
    else if (!strcmp(key, "lost_file")) snprintf(g->lost_file, sizeof g->lost_file, "%s", text);
    else if (!strcmp(key, "error_file")) snprintf(g->error_file, sizeof g->error_file, "%s", text);
    else if (!strcmp(key, "name")) { snprintf(g->name, sizeof g->name, "%.63s", text); for (char *c = g->name; *c; c++) if (*c == '_') *c = ' '; }
    else { fprintf(stderr, "fake_nvml: unknown setting %s\n", key); exit(70); }
}

static void load(void) {
    for (int i = 0; i < MAX_GPUS; i++) {
        gpu_t *g = &gpus[i];
        memset(g, 0, sizeof *g);
        g->index = i;
        snprintf(g->uuid, sizeof g->uuid, "GPU-%08d-0000-0000-0000-00000000000%d", i, i % 10);
        snprintf(g->name, sizeof g->name, "NVIDIA H100 80GB HBM3");
        g->power_w = 300; g->step_at_s = 1e18; g->energy_period_ms = 100; g->lost_after_s = 1e18;
        g->power_limit_w = 700; g->sm_mhz = 1755; g->max_sm_mhz = 1980; g->temperature_c = 50;
        g->sm_active = 90; g->occupancy = 40; g->tensor = 30; g->dram = 60; g->memory_bytes = 85520809984.0;
        g->used_bytes = 1e9; g->released_at_s = 1e18; g->energy_bits = g->pcie_bits = 64; g->gpm = 1; g->ecc = 1;
        g->util = 100; 
    }
    num_gpus = 1; init_error = 0;
    t0 = monotonic_s();
    const char *path = getenv("FAKE_NVML_CONFIG");
    FILE *f = path ? fopen(path, "r") : NULL;
    char line[512], a[64], b[64], c[64], d[256];
    while (f && fgets(line, sizeof line, f)) {
        int n = sscanf(line, "%63s %63s %63s %255s", a, b, c, d);
        if (n == 4 && !strcmp(a, "gpu")) {
            for (int i = 0; i < MAX_GPUS; i++)
                if (!strcmp(b, "*") || atoi(b) == i) set(&gpus[i], c, d);
        } else if (n == 2 && !strcmp(a, "num_gpus")) num_gpus = atoi(b);
        else if (n == 2 && !strcmp(a, "t0_monotonic_s")) t0 = atof(b);
        else if (n == 2 && !strcmp(a, "init_error")) init_error = atoi(b);
        else if (n == 2 && !strcmp(a, "driver")) snprintf(driver, sizeof driver, "%s", b);
    }
    if (f) fclose(f);
}

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    load();
    if (init_error) return init_error;
    ready = 1;
    return OK;
}
nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
nvmlReturn_t nvmlShutdown(void) { ready = 0; return OK; }
const char *nvmlErrorString(nvmlReturn_t r) {
    switch (r) { case LOST: return "GPU is lost"; case NOT_SUPPORTED: return "Not Supported"; case 9: return "Driver Not Loaded";
                 case 18: return "Driver/library version mismatch"; default: return "Some error"; }
}

/* Every entry that takes a device starts with this. */
static nvmlReturn_t check(gpu_t *g) {
    if (!ready) return UNINITIALIZED;
    if (!g || g < gpus || g >= gpus + num_gpus) return INVALID_ARGUMENT;
    if (now_s() >= g->lost_after_s || (*g->lost_file && !access(g->lost_file, F_OK))) return LOST;
    return OK;
}
#define CHECK(g) do { nvmlReturn_t r_ = check(g); if (r_) return r_; } while (0)

static double power_at(const gpu_t *g, double t) { return t >= g->step_at_s ? g->step_power_w : g->power_w; }
static double joules_until(const gpu_t *g, double t) {
    double before = t < g->step_at_s ? t : g->step_at_s;
    return g->power_w * before + (t > g->step_at_s ? g->step_power_w * (t - g->step_at_s) : 0);
}
static unsigned long long truncated(double v, int bits) {
    unsigned long long whole = (unsigned long long)v;
    return bits >= 64 ? whole : whole & ((1ULL << bits) - 1);
}
static void put_counter(field_value_t *f, double v, int bits) {
    if (bits <= 32) { f->valueType = 1; f->value.ui = (unsigned int)truncated(v, bits); }
    else { f->valueType = 3; f->value.ull = truncated(v, bits); }
}

static nvmlReturn_t read_field(gpu_t *g, field_value_t *f, double t) {
    for (int i = 0; i < g->num_unsupported; i++)
        if (g->unsupported[i] == (int)f->fieldId) return NOT_SUPPORTED;
    double period = g->energy_period_ms * 1e-3;
    switch (f->fieldId) {
    case 83: case 191: put_counter(f, g->energy_offset_mj + 1e3 * joules_until(g, period * (double)(long long)(t / period)), g->energy_bits); return OK;
    case 185: f->valueType = 1; f->value.ui = (unsigned int)(1e3 * power_at(g, t - 0.5)); return OK;
    case 186: f->valueType = 1; f->value.ui = (unsigned int)(1e3 * power_at(g, t)); return OK;
    case 189: case 190: f->valueType = 1; f->value.ui = (unsigned int)(1e3 * g->power_limit_w); return OK;
    case 74: put_counter(f, 1e9 * t * g->throttled_share[0], 64); return OK;
    case 76: put_counter(f, 1e9 * t * g->throttled_share[1], 64); return OK;
    case 269: case 270: case 271: put_counter(f, 1e9 * t * g->throttled_share[f->fieldId - 267], 64); return OK;
    case 197: case 198: put_counter(f, g->pcie_offset_bytes + t * g->pcie_bytes_per_s, g->pcie_bits); return OK;
    case 138: case 139:
        if ((int)f->scopeId >= g->num_links) return NOT_SUPPORTED;
        put_counter(f, t * g->nvlink_kib_per_s, 64);
        return OK;
    case 82: f->valueType = 1; f->value.ui = (unsigned int)(g->temperature_c + 5); return OK;
    default: return INVALID_ARGUMENT;
    }
}

nvmlReturn_t nvmlDeviceGetFieldValues(gpu_t *g, int count, field_value_t *values) {
    CHECK(g);
    double t = now_s();
    if (*g->error_file && !access(g->error_file, F_OK)) return 999;
    if (g->refuse_unknown) /* as an old driver: one unknown id refuses the whole call */
        for (int i = 0; i < count; i++) { field_value_t f = values[i]; if (read_field(g, &f, t) == INVALID_ARGUMENT || (f.fieldId >= 185 && f.fieldId != 191)) return INVALID_ARGUMENT; }
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    for (int i = 0; i < count; i++) {
        values[i].timestamp = (long long)wall.tv_sec * 1000000 + wall.tv_nsec / 1000;
        values[i].latencyUsec = 1;
        values[i].nvmlReturn = read_field(g, &values[i], t);
    }
    return OK;
}

static nvmlReturn_t text(const char *s, char *out, unsigned int n) { snprintf(out, n, "%s", s); return OK; }
nvmlReturn_t nvmlSystemGetDriverVersion(char *out, unsigned int n) { return text(driver, out, n); }
nvmlReturn_t nvmlSystemGetNVMLVersion(char *out, unsigned int n) { return text("12.570.86.15", out, n); }
nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *v) { *v = 12080; return OK; }
nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *v) { *v = 12080; return OK; }
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *n) { if (!ready) return UNINITIALIZED; *n = num_gpus; return OK; }
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int i, gpu_t **g) {
    if (!ready) return UNINITIALIZED;
    if ((int)i >= num_gpus) return INVALID_ARGUMENT;
    *g = &gpus[i];
    return check(*g);
}
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, gpu_t **g) {
    for (int i = 0; ready && i < num_gpus; i++)
        if (!strcmp(uuid, gpus[i].uuid)) { *g = &gpus[i]; return check(*g); }
    return NOT_FOUND;
}
nvmlReturn_t nvmlDeviceGetUUID(gpu_t *g, char *out, unsigned int n) { CHECK(g); return text(g->uuid, out, n); }
nvmlReturn_t nvmlDeviceGetName(gpu_t *g, char *out, unsigned int n) { CHECK(g); return text(g->name, out, n); }
nvmlReturn_t nvmlDeviceGetVbiosVersion(gpu_t *g, char *out, unsigned int n) { CHECK(g); return text("96.00.74.00.01", out, n); }
nvmlReturn_t nvmlDeviceGetIndex(gpu_t *g, unsigned int *i) { CHECK(g); *i = g->index; return OK; }
nvmlReturn_t nvmlDeviceGetPciInfo_v3(gpu_t *g, pci_t *p) {
    CHECK(g);
    memset(p, 0, sizeof *p);
    p->bus = 0x10 + g->index; p->pciDeviceId = 0x233010de;
    snprintf(p->busId, sizeof p->busId, "00000000:%02X:00.0", p->bus);
    return OK;
}
nvmlReturn_t nvmlDeviceGetClockInfo(gpu_t *g, int kind, unsigned int *mhz) { CHECK(g); *mhz = kind == 2 ? 2619 : (unsigned int)g->sm_mhz; return OK; }
nvmlReturn_t nvmlDeviceGetMaxClockInfo(gpu_t *g, int kind, unsigned int *mhz) { CHECK(g); *mhz = kind == 2 ? 2619 : (unsigned int)g->max_sm_mhz; return OK; }
nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(gpu_t *g, unsigned long long *mask) { CHECK(g); *mask = g->throttled_share[0] > 0 ? 4 : 0; return OK; }
nvmlReturn_t nvmlDeviceGetUtilizationRates(gpu_t *g, unsigned int *two) { CHECK(g); two[0] = g->util; two[1] = 40; return OK; }
static unsigned long long used_now(gpu_t *g) { return (unsigned long long)(now_s() >= g->released_at_s ? g->used_after_bytes : g->used_bytes); }
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(gpu_t *g, memory_v2_t *m) {
    CHECK(g);
    if (g->no_memory_v2) return NOT_SUPPORTED;
    if (m->version != (sizeof(memory_v2_t) | 2u << 24)) return VERSION_MISMATCH;
    m->total = (unsigned long long)g->memory_bytes; m->reserved = 500000000; m->used = used_now(g); m->free = m->total - m->reserved - m->used;
    return OK;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo(gpu_t *g, memory_t *m) {
    CHECK(g);
    m->total = (unsigned long long)g->memory_bytes; m->used = used_now(g) + 500000000; m->free = m->total - m->used;
    return OK;
}
nvmlReturn_t nvmlDeviceGetTemperatureV(gpu_t *g, temperature_t *t) {
    CHECK(g);
    if (g->no_temperature_v) return NOT_SUPPORTED;
    if (t->version != (sizeof(temperature_t) | 1u << 24)) return VERSION_MISMATCH;
    t->temperature = (int)(g->temperature_c + g->degrees_per_s * now_s());
    return OK;
}
nvmlReturn_t nvmlDeviceGetTemperature(gpu_t *g, int sensor, unsigned int *t) { (void)sensor; CHECK(g); *t = (unsigned int)g->temperature_c; return OK; }
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(gpu_t *g, unsigned int *count, process_t *out) {
    CHECK(g);
    int n = now_s() >= g->released_at_s ? 0 : g->num_processes;
    unsigned int room = *count;
    *count = n;
    if (n == 0) return OK;
    if ((int)room < n || !out) return INSUFFICIENT_SIZE;
    for (int i = 0; i < n; i++) out[i] = (process_t){g->pids[i], used_now(g) / n, 0xFFFFFFFF, 0xFFFFFFFF};
    return OK;
}
nvmlReturn_t nvmlDeviceGetEccMode(gpu_t *g, int *now, int *pending) { CHECK(g); *now = *pending = g->ecc; return OK; }
nvmlReturn_t nvmlDeviceGetMigMode(gpu_t *g, unsigned int *now, unsigned int *pending) { CHECK(g); *now = *pending = g->mig; return OK; }
nvmlReturn_t nvmlDeviceGetPersistenceMode(gpu_t *g, int *mode) { CHECK(g); *mode = 1; return OK; }
nvmlReturn_t nvmlDeviceGetPowerManagementLimit(gpu_t *g, unsigned int *mw) { CHECK(g); *mw = (unsigned int)(1e3 * g->power_limit_w); return OK; }
nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(gpu_t *g, unsigned int *mw) { return nvmlDeviceGetPowerManagementLimit(g, mw); }
nvmlReturn_t nvmlDeviceGetPowerManagementDefaultLimit(gpu_t *g, unsigned int *mw) { CHECK(g); *mw = 700000; return OK; }
nvmlReturn_t nvmlDeviceGetCudaComputeCapability(gpu_t *g, int *major, int *minor) { CHECK(g); *major = 9; *minor = 0; return OK; }
nvmlReturn_t nvmlDeviceGetCurrPcieLinkGeneration(gpu_t *g, unsigned int *v) { CHECK(g); *v = 5; return OK; }
nvmlReturn_t nvmlDeviceGetMaxPcieLinkGeneration(gpu_t *g, unsigned int *v) { CHECK(g); *v = 5; return OK; }
nvmlReturn_t nvmlDeviceGetCurrPcieLinkWidth(gpu_t *g, unsigned int *v) { CHECK(g); *v = 16; return OK; }
nvmlReturn_t nvmlDeviceGetMaxPcieLinkWidth(gpu_t *g, unsigned int *v) { CHECK(g); *v = 16; return OK; }
nvmlReturn_t nvmlDeviceGetNvLinkState(gpu_t *g, unsigned int link, unsigned int *active) {
    CHECK(g);
    if ((int)link >= g->num_links) return INVALID_ARGUMENT;
    *active = 1;
    return OK;
}
nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(gpu_t *a, gpu_t *b, int *level) { CHECK(a); CHECK(b); *level = 40; return OK; }
nvmlReturn_t nvmlDeviceGetNumGpuCores(gpu_t *g, unsigned int *n) { CHECK(g); *n = 16896; return OK; }

/* GPM: a sample is the moment it was taken; metrics of samples under 100 ms apart read zero, as the real ones do. */
nvmlReturn_t nvmlGpmQueryDeviceSupport(gpu_t *g, gpm_support_t *s) {
    CHECK(g);
    if (s->version != 1) return VERSION_MISMATCH;
    s->isSupportedDevice = g->gpm;
    return OK;
}
typedef struct { gpu_t *gpu; double t; } sample_t;
nvmlReturn_t nvmlGpmSampleAlloc(sample_t **s) { *s = calloc(1, sizeof **s); return OK; }
nvmlReturn_t nvmlGpmSampleFree(sample_t *s) { free(s); return OK; }
nvmlReturn_t nvmlGpmSampleGet(gpu_t *g, sample_t *s) {
    CHECK(g);
    if (!g->gpm) return NOT_SUPPORTED;
    s->gpu = g; s->t = now_s();
    return OK;
}
nvmlReturn_t nvmlGpmMetricsGet(metrics_get_t *m) {
    if (m->version != 1) return VERSION_MISMATCH;
    sample_t *a = m->sample1, *b = m->sample2;
    if (!a || !b || !a->gpu || a->gpu != b->gpu) return INVALID_ARGUMENT;
    gpu_t *g = a->gpu;
    int zero = b->t - a->t < 0.1;
    for (unsigned int i = 0; i < m->numMetrics; i++) {
        metric_t *k = &m->metrics[i];
        k->nvmlReturn = OK;
        switch (k->metricId) {
        case 2: k->value = g->sm_active; break;
        case 3: k->value = g->occupancy; break;
        case 5: k->value = g->tensor; break;
        case 10: k->value = g->dram; break;
        case 20: case 21: k->value = g->pcie_bytes_per_s / 1048576; break;
        case 60: case 61: if (g->num_links) k->value = g->num_links * g->nvlink_kib_per_s / 1024; else k->nvmlReturn = NOT_SUPPORTED; break;
        default: k->nvmlReturn = NOT_SUPPORTED;
        }
        if (zero) k->value = 0;
    }
    return OK;
}
