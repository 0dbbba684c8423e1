/* A guest of a few KiB that proves a virtio-blk disk: `write TOKEN` on its command line writes blocks derived from the token,
   flushes, and reads them back; `verify TOKEN` only reads. The verdict is one line on the serial port, then it powers off.
   `hold TOKEN` is `write` without the power-off: a VM that stays, and that ignores the power button.

   It does as little as it can, because it also has to run where the processor is emulated instruction by instruction: no
   interrupts (the used ring is polled), one queue, one request at a time, 4 blocks of 4 KiB at places apart from each other.
   Every wait is bounded. It uses the modern virtio-pci interface only. */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline u8 inb(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory"); return value; }
static inline u32 inl(u16 port) { u32 value; __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory"); return value; }
/* A locked instruction orders what the ordinary ones before and after it do; mfence would need SSE2. */
static inline void barrier(void) { __asm__ volatile("lock; addl $0, (%%esp)" : : : "memory", "cc"); }

/* ---- serial port ---- */

static void put_char(char c)
{
    for (u32 spin = 0; spin < 10000 && !(inb(0x3fd) & 0x20); spin++) { }
    outb(0x3f8, c);
}

static void put(const char *text)
{
    while (*text) put_char(*text++);
}

static void put_hex(u32 value)
{
    for (int shift = 28; shift >= 0; shift -= 4) put_char("0123456789abcdef"[value >> shift & 15]);
}

static void __attribute__((noreturn)) power_off(void)
{
    outb(0x600, 0x34);   /* Cloud Hypervisor: sleep type 5, enable */
    outw(0x604, 0x2000); /* QEMU's q35: the same in its ACPI control register */
    for (;;) __asm__ volatile("cli; hlt");
}

static void __attribute__((noreturn)) fail(const char *what, u32 detail)
{
    put("UNIBODY-GUEST FAIL ");
    put(what);
    put(" ");
    put_hex(detail);
    put("\n");
    power_off();
}

/* ---- what the compiler may call ---- */

void *memset(void *target, int value, u32 count)
{
    void *start = target;
    __asm__ volatile("rep stosb" : "+D"(target), "+c"(count) : "a"(value) : "memory");
    return start;
}

/* ---- PCI by its two ports ---- */

static u32 pci_read(u32 device, u32 offset)
{
    outl(0xcf8, 0x80000000u | device | (offset & 0xfc));
    return inl(0xcfc);
}

static void pci_write(u32 device, u32 offset, u32 value)
{
    outl(0xcf8, 0x80000000u | device | (offset & 0xfc));
    outl(0xcfc, value);
}

static u8 pci_read8(u32 device, u32 offset)
{
    return pci_read(device, offset) >> (offset & 3) * 8;
}

/* The first virtio-blk device on this bus or behind its bridges; 0 if there is none (the host bridge is device 0). */
static u32 find_disk(u32 bus, u32 depth)
{
    for (u32 slot = 0; slot < 32; slot++) {
        for (u32 function = 0; function < 8; function++) {
            u32 device = bus << 16 | slot << 11 | function << 8;
            u32 id = pci_read(device, 0);
            if (id == 0xffffffff) {
                if (function == 0) break;
                continue;
            }
            /* 0x1042: modern; 0x1001: transitional, with the modern interface beside the old one */
            if (id == 0x10421af4 || id == 0x10011af4) return device;
            u8 header = pci_read8(device, 0x0e);
            if ((header & 0x7f) == 1 && depth < 3) {
                u32 below = pci_read8(device, 0x19);
                u32 found = below > bus ? find_disk(below, depth + 1) : 0;
                if (found) return found;
            }
            if (function == 0 && !(header & 0x80)) break;
        }
        /* Behind a PCI Express port there is one slot only. */
        if (depth) break;
    }
    return 0;
}

/* ---- virtio ---- */

enum { QUEUE_SIZE = 8, BLOCK = 4096, BLOCKS = 4, TYPE_IN = 0, TYPE_OUT = 1, TYPE_FLUSH = 4 };
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, FLUSH_FEATURE = 1 << 9 };

struct descriptor { u64 address; u32 length; u16 flags; u16 next; };

static struct descriptor table[QUEUE_SIZE] __attribute__((aligned(4096)));
static volatile u16 available[3 + QUEUE_SIZE] __attribute__((aligned(4096)));          /* flags, index, ring, event */
static volatile u32 used[1 + 2 * QUEUE_SIZE + 1] __attribute__((aligned(4096)));       /* flags and index, ring, event */
static u32 block[BLOCK / 4] __attribute__((aligned(4096)));
static struct { u32 type; u32 reserved; u64 sector; } head __attribute__((aligned(64)));
static volatile u8 status __attribute__((aligned(64)));
static volatile u8 *common, *notify, *config;

#define COMMON8(offset) (*(volatile u8 *)(common + (offset)))
#define COMMON16(offset) (*(volatile u16 *)(common + (offset)))
#define COMMON32(offset) (*(volatile u32 *)(common + (offset)))

static u8 *bar(u32 device, u32 index)
{
    u32 low = pci_read(device, 0x10 + index * 4);
    if (low & 1) fail("the device has no memory registers", low);
    if ((low & 6) == 4 && pci_read(device, 0x14 + index * 4)) fail("registers above 4 GiB", low);
    if (!(low & ~15u)) fail("registers have no address", index);
    return (u8 *)(low & ~15u);
}

static void find_registers(u32 device)
{
    u32 multiplier = 0;
    u8 *notify_base = 0;
    pci_write(device, 4, pci_read(device, 4) | 6); /* memory and bus master */
    u32 bound = 32;
    for (u32 at = pci_read8(device, 0x34); at && bound; at = pci_read8(device, at + 1), bound--) {
        if (pci_read8(device, at) != 9) continue;
        u8 kind = pci_read8(device, at + 3);
        if (kind != 1 && kind != 2 && kind != 4) continue;
        u8 *registers = bar(device, pci_read8(device, at + 4)) + pci_read(device, at + 8);
        if (kind == 1) common = registers;
        if (kind == 4) config = registers;
        if (kind == 2) {
            notify_base = registers;
            multiplier = pci_read(device, at + 16);
        }
    }
    if (!common || !notify_base || !config) fail("no modern virtio interface", 0);
    COMMON8(20) = 0;
    for (u32 spin = 0; COMMON8(20); spin++) if (spin > 100000) fail("reset", COMMON8(20));
    COMMON8(20) = ACKNOWLEDGE;
    COMMON8(20) = ACKNOWLEDGE | DRIVER;
    COMMON32(0) = 0;
    u32 offered = COMMON32(4);
    COMMON32(0) = 1;
    if (!(COMMON32(4) & 1)) fail("not a virtio 1 device", COMMON32(4));
    /* Without FLUSH this guest could not prove durability, so it does not go on. */
    if (!(offered & FLUSH_FEATURE)) fail("no flush", offered);
    COMMON32(8) = 0;
    COMMON32(12) = FLUSH_FEATURE;
    COMMON32(8) = 1;
    COMMON32(12) = 1;
    COMMON8(20) = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    if (!(COMMON8(20) & FEATURES_OK)) fail("features", COMMON8(20));
    COMMON16(22) = 0;
    if (COMMON16(24) < QUEUE_SIZE) fail("queue size", COMMON16(24));
    COMMON16(24) = QUEUE_SIZE;
    notify = notify_base + COMMON16(30) * multiplier;
    u32 places[3] = { (u32)table, (u32)available, (u32)used };
    for (u32 i = 0; i < 3; i++) {
        COMMON32(32 + i * 8) = places[i];
        COMMON32(36 + i * 8) = 0;
    }
    available[0] = 1; /* no interrupts */
    COMMON16(28) = 1;
    COMMON8(20) = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
}

static void request(u32 type, u32 sector)
{
    head.type = type;
    head.sector = sector;
    status = 0xff;
    u32 data = type == TYPE_FLUSH ? 0 : 1;
    table[0] = (struct descriptor){ (u32)&head, sizeof head, 1, data ? 1 : 2 };
    table[1] = (struct descriptor){ (u32)block, BLOCK, type == TYPE_IN ? 3 : 1, 2 };
    table[2] = (struct descriptor){ (u32)&status, 1, 2, 0 };
    u16 index = available[1];
    available[2 + index % QUEUE_SIZE] = 0;
    barrier();
    available[1] = index + 1;
    barrier();
    *(volatile u16 *)notify = 0;
    for (u32 spin = 0; (u16)(used[0] >> 16) != (u16)(index + 1); spin++) {
        /* Reading the device's status leaves the guest, which lets the host work. A slow host has minutes. */
        if (!(spin & 1023)) (void)COMMON8(20);
        if (spin > 200000000) fail("no answer to request", type);
    }
    barrier();
    if (status) fail("the device refused request", type << 8 | status);
}

/* ---- the work ---- */

static u32 word(u32 seed, u32 at)
{
    u32 value = (seed ^ at * 0x9e3779b9u) * 0x85ebca6bu;
    return value ^ value >> 15;
}

static void write_blocks(u32 seed, u32 stride)
{
    for (u32 n = 0; n < BLOCKS; n++) {
        for (u32 i = 0; i < BLOCK / 4; i++) block[i] = word(seed, n << 16 | i);
        request(TYPE_OUT, n * stride);
    }
    request(TYPE_FLUSH, 0);
}

static void verify_blocks(u32 seed, u32 stride)
{
    for (u32 n = 0; n < BLOCKS; n++) {
        memset(block, 0xa5, BLOCK);
        request(TYPE_IN, n * stride);
        for (u32 i = 0; i < BLOCK / 4; i++) if (block[i] != word(seed, n << 16 | i)) fail("content differs at", n << 16 | i);
    }
}

static const char *after(const char *text, const char *prefix)
{
    while (*prefix) if (*text++ != *prefix++) return 0;
    return text;
}

void guest_main(const u32 *info)
{
    const char *line = (const char *)info[6]; /* cmdline_paddr; its upper half is zero below 4 GiB */
    if (info[0] != 0x336ec578) fail("no start info", info[0]);
    while (*line == ' ') line++;
    const char *token = after(line, "write ");
    u32 holds = 0;
    if (!token) {
        token = after(line, "hold ");
        holds = token != 0;
    }
    u32 writes = token != 0;
    if (!token) token = after(line, "verify ");
    if (!token) fail("the command line must be `write`, `hold` or `verify` and a token", 0);
    u32 seed = 2166136261u;
    for (const char *c = token; *c && *c != ' '; c++) seed = (seed ^ (u8)*c) * 16777619u;

    u32 device = find_disk(0, 0);
    if (!device) fail("no virtio-blk device", 0);
    find_registers(device);
    u32 sectors = *(volatile u32 *)config;
    if (*(volatile u32 *)(config + 4)) sectors = 0xfffff000u;
    /* Spread over the disk, so that different stripes and chunks are touched. */
    u32 stride = sectors / BLOCKS & ~7u;
    if (!stride) fail("the disk is too small", sectors);
    if (writes) write_blocks(seed, stride);
    verify_blocks(seed, stride);
    put("UNIBODY-GUEST OK ");
    put(writes ? "wrote " : "verified ");
    put_hex(seed);
    put("\n");
    while (holds) __asm__ volatile("cli; hlt");
    power_off();
}
