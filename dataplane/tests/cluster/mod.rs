//! Several data planes in one process, over loopback, with relays between them that can cut: for the tests of links.
//!
//! The control state is a stand-in: one configuration for all, which says yes to what is allowed.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use unibody_dataplane::config::{Change, Outcome, Proposal, Slot, SlotState, VolumeConfig};
use unibody_dataplane::disk::open::OpenDisk;
use unibody_dataplane::disk::spec::Backend;
use unibody_dataplane::frontend::{self, DeviceConfig, DeviceId, Export, Queue};
use unibody_dataplane::geometry::Geometry;
use unibody_dataplane::ids::{BootId, DiskUuid, Generation, LayerId, PowerId, VolumeId};
use unibody_dataplane::mirror::MirrorStatus;
use unibody_dataplane::plane::{
    DiskIndex, DiskService, DiskUp, Event, LinkStatus, Plane, QueueKey, VolumeIndex,
};
use unibody_dataplane::store::{FormatOptions, OpenOptions, Store};
use unibody_dataplane::wire::handshake::{
    self, Counts, Handshake, Incarnation, Local, NodeId, PARAMS, Purpose, Token,
};

/// How long anything may take that must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until it is so.
pub(crate) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn random() -> u128 {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .unwrap();
    u128::from_le_bytes(bytes)
}

pub(crate) fn local(node: u64, incarnation: Incarnation, secret: &str) -> Local {
    let mut nonce = [0; 32];
    nonce[..16].copy_from_slice(&random().to_le_bytes());
    nonce[16..].copy_from_slice(&random().to_le_bytes());
    Local {
        node: NodeId(node),
        incarnation,
        token: Token::new(secret.as_bytes()),
        nonce,
    }
}

/// What all nodes know.
pub(crate) struct Cluster {
    /// Where each node is to be dialed.
    pub(crate) addresses: Mutex<BTreeMap<NodeId, SocketAddr>>,
    pub(crate) config: Mutex<VolumeConfig>,
    /// The changes that were committed.
    pub(crate) changes: Mutex<Vec<Change>>,
}

impl Cluster {
    /// A volume with a replica of each chunk on each of the disks.
    pub(crate) fn new(size: u64, disks: &[DiskUuid]) -> Arc<Self> {
        let geometry = Geometry::new(256 << 10, 1).unwrap();
        let slot = |&disk: &DiskUuid| Slot {
            disk,
            state: SlotState::InSync,
            incarnation: 1,
            boot: BootId::default(),
            power: PowerId::default(),
        };
        let config = VolumeConfig {
            id: VolumeId(1),
            head: LayerId(1),
            size,
            geometry,
            generation: Generation(1),
            config: 1,
            chunks: vec![disks.iter().map(slot).collect(); geometry.chunks(size) as usize],
        };
        Arc::new(Cluster {
            addresses: Mutex::default(),
            config: Mutex::new(config),
            changes: Mutex::default(),
        })
    }

    fn decide(&self, proposal: Proposal) -> Outcome {
        let mut config = self.config.lock().unwrap();
        if (proposal.generation, proposal.config) != (config.generation, config.config) {
            return Outcome::Moved(config.clone());
        }
        config.config += 1;
        let (disk, chunks) = match &proposal.change {
            Change::MarkStale { disk, chunks, .. }
            | Change::StartRebuild { disk, chunks }
            | Change::MarkInSync { disk, chunks, .. } => (*disk, chunks.clone()),
        };
        for chunk in chunks {
            let slots = &mut config.chunks[chunk as usize];
            let others = slots
                .iter()
                .any(|slot| slot.disk != disk && slot.state == SlotState::InSync);
            let Some(slot) = slots.iter_mut().find(|slot| slot.disk == disk) else {
                continue;
            };
            match proposal.change {
                Change::MarkStale { .. } if others => slot.state = SlotState::Stale,
                Change::MarkStale { .. } => {}
                Change::StartRebuild { .. } => slot.state = SlotState::Rebuilding,
                Change::MarkInSync { boot, power, .. } => {
                    slot.state = SlotState::InSync;
                    (slot.boot, slot.power) = (boot, power);
                }
            }
        }
        self.changes.lock().unwrap().push(proposal.change);
        Outcome::Committed(config.clone())
    }

    /// How often a replica was taken out.
    pub(crate) fn marked_stale(&self) -> usize {
        let changes = self.changes.lock().unwrap();
        changes
            .iter()
            .filter(|change| matches!(change, Change::MarkStale { .. }))
            .count()
    }
}

/// A node: a plane, a listener, and the threads that answer its events.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) plane: Arc<Plane>,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    pub(crate) handshakes: Arc<Counts>,
    incarnation: Incarnation,
    over: Arc<AtomicBool>,
}

impl Node {
    pub(crate) fn start(id: u64, cluster: &Arc<Cluster>, reactors: usize) -> Node {
        let cores = unibody_dataplane::reactor::pin::allowed_cores();
        let cores: Vec<usize> = (0..reactors)
            .map(|n| cores[(id as usize + n) % cores.len()])
            .collect();
        let (plane, events) = Plane::start(&cores).unwrap();
        let plane = Arc::new(plane);
        let incarnation = Incarnation(random());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        cluster.addresses.lock().unwrap().insert(NodeId(id), address);
        let (over, handshakes) = (Arc::new(AtomicBool::new(false)), Arc::new(Counts::default()));
        {
            let (plane, over, handshakes) =
                (Arc::downgrade(&plane), Arc::clone(&over), Arc::clone(&handshakes));
            std::thread::spawn(move || {
                for socket in listener.incoming() {
                    if over.load(Ordering::SeqCst) {
                        return;
                    }
                    let (plane, handshakes) = (plane.clone(), Arc::clone(&handshakes));
                    let local = local(id, incarnation, "secret");
                    std::thread::spawn(move || {
                        let Ok(mut socket) = socket else { return };
                        let shake = Handshake::listen(local, &[(Purpose::Data, [0; PARAMS])]);
                        let outcome = handshake::run(&mut socket, shake, Duration::from_secs(5));
                        handshakes.count(&outcome);
                        if let (Ok(peer), Some(plane)) = (outcome, plane.upgrade()) {
                            plane.accept(socket, peer).ok();
                        }
                    });
                }
            });
        }
        {
            let (plane, over, cluster) = (Arc::downgrade(&plane), Arc::clone(&over), Arc::clone(cluster));
            std::thread::spawn(move || {
                for event in events {
                    match event {
                        Event::Proposal(index, _, proposal) => {
                            let outcome = cluster.decide(proposal);
                            if let Some(plane) = plane.upgrade() {
                                plane.decided(index, outcome);
                            }
                        }
                        Event::Dial { node, reactor, .. } => {
                            let (plane, over, cluster) =
                                (plane.clone(), Arc::clone(&over), Arc::clone(&cluster));
                            std::thread::spawn(move || {
                                dial(&plane, &over, &cluster, id, incarnation, node, reactor)
                            });
                        }
                        _ => {}
                    }
                }
            });
        }
        Node {
            id: NodeId(id),
            plane,
            address,
            handshakes,
            incarnation,
            over,
        }
    }

    pub(crate) fn links(&self) -> Vec<LinkStatus> {
        self.plane
            .status()
            .into_iter()
            .flat_map(|shard| shard.links)
            .collect()
    }

    pub(crate) fn volume(&self) -> MirrorStatus {
        self.plane
            .status()
            .into_iter()
            .flat_map(|shard| shard.volumes)
            .map(|(_, status)| status)
            .next()
            .expect("the volume is owned")
    }

    /// Owns the volume as long as the returned device lives; its client polls.
    pub(crate) fn serve(&self, cluster: &Cluster, disks: Vec<DiskUp>, dir: &Path) -> Device {
        self.serve_to(cluster, disks, dir, true)
    }

    /// The same; a client that does not poll sleeps until it is called.
    pub(crate) fn serve_to(&self, cluster: &Cluster, disks: Vec<DiskUp>, dir: &Path, polls: bool) -> Device {
        let config = cluster.config.lock().unwrap().clone();
        let size = config.size;
        self.plane.add_volume(VolumeIndex(0), config, disks);
        let path = dir.join("v.sock");
        let device = DeviceConfig {
            capacity_bytes: size,
            queues_max: 1,
            queue_size_max: 256,
            read_only: false,
            serial: "wire".into(),
            instance: 1,
        };
        let sessions = Arc::new(Sessions(Arc::clone(&self.plane)));
        let export = Export::new(DeviceId(0), device, &path, sessions).unwrap();
        Device {
            client: Some(Client::connect(&path, size, polls)),
            export: Some(export),
            plane: Arc::clone(&self.plane),
        }
    }

    /// Ends it, all at once, as a killed process.
    pub(crate) fn kill(self) {
        drop(self);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // Wakes the listener.
        TcpStream::connect(self.address).ok();
    }
}

fn dial(
    plane: &Weak<Plane>,
    over: &AtomicBool,
    cluster: &Cluster,
    id: u64,
    incarnation: Incarnation,
    node: NodeId,
    reactor: u16,
) {
    while !over.load(Ordering::SeqCst) {
        let Some(plane) = plane.upgrade() else { return };
        let address = cluster.addresses.lock().unwrap().get(&node).copied();
        let local = local(id, incarnation, "secret");
        if let Some(address) = address
            && plane
                .dial(local, node, reactor, address, Duration::from_secs(2))
                .is_ok()
        {
            return;
        }
        drop(plane);
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Sessions(Arc<Plane>);

impl frontend::Plane for Sessions {
    fn start_queue(&self, device: DeviceId, index: u16, queue: Queue) {
        let key = QueueKey {
            device: device.0,
            index,
        };
        self.0.start_queue(key, VolumeIndex(0), Box::new(queue));
    }

    fn stop_queue(&self, device: DeviceId, index: u16) -> Option<Queue> {
        let key = QueueKey {
            device: device.0,
            index,
        };
        self.0.stop_queue(key, VolumeIndex(0)).map(|queue| *queue)
    }

    fn report(&self, _: DeviceId, message: &str) {
        panic!("{message}");
    }
}

/// The volume as a guest has it.
pub(crate) struct Device {
    pub(crate) client: Option<Client>,
    export: Option<Export>,
    plane: Arc<Plane>,
}

impl Device {
    pub(crate) fn client(&mut self) -> &mut Client {
        self.client.as_mut().unwrap()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        drop(self.client.take());
        drop(self.export.take());
        self.plane.remove_volume(VolumeIndex(0)).recv().ok();
    }
}

/// A guest: what it wrote it knows.
pub(crate) struct Client {
    queue: Blkioq,
    /// Completions to sleep for.
    wait: usize,
    memory: MemoryRegion,
    _blkio: Blkio,
    /// For each block of 4 KiB the stamp last written; zero: never.
    stamps: Vec<u32>,
    next: u32,
}

/// Requests under way at most.
pub(crate) const DEPTH: usize = 32;
/// Longest request, bytes.
pub(crate) const LONGEST: usize = 256 << 10;

impl Client {
    fn connect(path: &Path, size: u64, polls: bool) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", path.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        blkio.set_i32("num-queues", i32::from(!polls)).unwrap();
        blkio.set_i32("num-poll-queues", i32::from(polls)).unwrap();
        let mut started = blkio.start().unwrap();
        let memory = blkio.alloc_mem_region(DEPTH * LONGEST).unwrap();
        blkio.map_mem_region(&memory).unwrap();
        Client {
            queue: if polls {
                started.poll_queues.remove(0)
            } else {
                started.queues.remove(0)
            },
            wait: usize::from(!polls),
            memory,
            _blkio: blkio,
            stamps: vec![0; (size / 4096) as usize],
            next: 0,
        }
    }

    fn buffer(&self, tag: usize) -> *mut u8 {
        (self.memory.addr + tag * LONGEST) as *mut u8
    }

    fn fill(&self, tag: usize, from: usize, stamps: &[u32]) {
        for (n, stamp) in stamps.iter().enumerate() {
            let word = u64::from(*stamp) << 32 | (from + n) as u64;
            let words = if *stamp == 0 { [0; 512] } else { [word; 512] };
            // SAFETY: the tag's part of the region; nothing is under way with this tag.
            unsafe { self.buffer(tag).add(n * 4096).cast::<[u64; 512]>().write(words) };
        }
    }

    fn check(&self, tag: usize, from: usize, stamps: &[u32]) {
        for (n, stamp) in stamps.iter().enumerate() {
            let word = u64::from(*stamp) << 32 | (from + n) as u64;
            let word = if *stamp == 0 { 0 } else { word };
            // SAFETY: as above.
            let words = unsafe { self.buffer(tag).add(n * 4096).cast::<[u64; 512]>().read() };
            for found in words {
                assert_eq!(
                    found,
                    word,
                    "block {}: stamp {} instead of {stamp}",
                    from + n,
                    found >> 32
                );
            }
        }
    }

    /// `count` requests at a depth of [`DEPTH`], reads and writes by `choose(n)`: write?, first block, blocks. What is read
    /// is checked. `between` is called now and then. All must succeed.
    pub(crate) fn run(
        &mut self,
        count: usize,
        choose: impl Fn(usize) -> (bool, usize, usize),
        between: impl FnMut(usize),
    ) {
        self.run_at(DEPTH, count, choose, between);
    }

    /// The same at a smaller depth.
    pub(crate) fn run_at(
        &mut self,
        depth: usize,
        count: usize,
        choose: impl Fn(usize) -> (bool, usize, usize),
        mut between: impl FnMut(usize),
    ) {
        let mut tags: Vec<usize> = (0..depth).collect();
        let mut under_way: Vec<Option<(bool, usize, Vec<u32>)>> = vec![None; DEPTH];
        let (mut begun, mut ended) = (0, 0);
        let started = Instant::now();
        while ended < count {
            while begun < count && !tags.is_empty() {
                let (write, first, blocks) = choose(begun);
                let overlaps = under_way
                    .iter()
                    .flatten()
                    .any(|(_, at, stamps)| first < at + stamps.len() && *at < first + blocks);
                if overlaps {
                    if under_way.iter().all(Option::is_none) {
                        unreachable!();
                    }
                    break;
                }
                let tag = tags.pop().unwrap();
                let (at, len) = (first as u64 * 4096, blocks * 4096);
                if write {
                    for block in first..first + blocks {
                        self.next += 1;
                        self.stamps[block] = self.next;
                    }
                }
                let stamps = self.stamps[first..first + blocks].to_vec();
                if write {
                    self.fill(tag, first, &stamps);
                    self.queue
                        .write(at, self.buffer(tag), len, tag, ReqFlags::empty());
                } else {
                    self.queue.read(at, self.buffer(tag), len, tag, ReqFlags::empty());
                }
                under_way[tag] = Some((write, first, stamps));
                begun += 1;
            }
            let mut room = [const { MaybeUninit::<Completion>::uninit() }; DEPTH];
            let got = self.queue.do_io(&mut room, self.wait, None, None).unwrap();
            for slot in &room[..got] {
                // SAFETY: `do_io` filled that many.
                let completion = unsafe { slot.assume_init_ref() };
                assert_eq!(completion.ret, 0, "request failed");
                let tag = completion.user_data;
                let (write, first, stamps) = under_way[tag].take().unwrap();
                if !write {
                    self.check(tag, first, &stamps);
                }
                tags.push(tag);
            }
            if got == 0 {
                assert!(started.elapsed() < PATIENCE, "the guest waits for ever");
                std::thread::yield_now();
            }
            ended += got;
            between(ended);
        }
    }

    /// Makes what was written durable.
    pub(crate) fn flush(&mut self) {
        self.queue.flush(0, ReqFlags::empty());
        let started = Instant::now();
        loop {
            let mut room = [const { MaybeUninit::<Completion>::uninit() }; 1];
            if self.queue.do_io(&mut room, 0, None, None).unwrap() == 1 {
                // SAFETY: `do_io` filled it.
                assert_eq!(unsafe { room[0].assume_init_ref() }.ret, 0);
                return;
            }
            assert!(started.elapsed() < PATIENCE, "the flush never ends");
            std::thread::yield_now();
        }
    }

    /// Reads the whole volume and compares.
    pub(crate) fn verify(&mut self) {
        let blocks = self.stamps.len();
        let each = LONGEST / 4096;
        self.run(blocks / each, |n| (false, n * each, each), |_| ());
    }
}

/// A mix of reads and writes of 4 to 128 KiB, different for each `seed`, the same each time.
pub(crate) fn mix(seed: usize, blocks: usize) -> impl Fn(usize) -> (bool, usize, usize) {
    move |n| {
        let mut x = (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (seed as u64) << 32;
        x = (x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^= x >> 32;
        let len = [1, 1, 1, 1, 2, 5, 16, 32][(x & 7) as usize];
        let at = (x >> 8) as usize % (blocks - len);
        (x >> 4 & 3 != 0, at, len)
    }
}

/// A freshly formatted disk in memory.
pub(crate) fn memory_disk(index: u16, uuid: u128, boot: u128) -> (DiskUp, DiskService) {
    let mut disk = OpenDisk::open(&Backend::Memory(256 << 20)).unwrap();
    format(&mut disk, uuid);
    open(disk, index, uuid, boot, true, |disk| disk)
}

pub(crate) fn format(disk: &mut OpenDisk, uuid: u128) {
    let options = FormatOptions {
        uuid: DiskUuid(uuid),
        journal_bytes: None,
        force: false,
        already_zero: true,
    };
    Store::format(disk.blocks().unwrap(), &options).unwrap();
}

/// Opens a formatted disk; `wrap` may put something around the device.
pub(crate) fn open(
    mut disk: OpenDisk,
    index: u16,
    uuid: u128,
    boot: u128,
    inline: bool,
    wrap: impl FnOnce(Box<dyn unibody_dataplane::disk::Disk>) -> Box<dyn unibody_dataplane::disk::Disk>,
) -> (DiskUp, DiskService) {
    let (boot, power) = (BootId(boot), PowerId(8));
    let options = OpenOptions {
        boot,
        power,
        cache_bytes: 16 << 20,
    };
    let (store, _) = Store::open(disk.blocks().unwrap(), &options).unwrap();
    let up = DiskUp {
        index: DiskIndex(index),
        uuid: DiskUuid(uuid),
        boot,
        power,
        inline,
        null: false,
    };
    let device = wrap(disk.into_disk(false).unwrap());
    (up, DiskService::Store(Box::new(store), device))
}

/// Passes bytes on between a dialer and a node, as long as it is allowed to.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    state: Arc<RelayState>,
}

struct RelayState {
    target: Mutex<SocketAddr>,
    sockets: Mutex<Vec<TcpStream>>,
    /// Bytes that may still pass before everything is cut; negative: any number.
    left: AtomicI64,
    closed: AtomicBool,
    cuts: AtomicU64,
}

impl Relay {
    pub(crate) fn start(target: SocketAddr) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let state = Arc::new(RelayState {
            target: Mutex::new(target),
            sockets: Mutex::default(),
            left: AtomicI64::new(-1),
            closed: AtomicBool::new(false),
            cuts: AtomicU64::new(0),
        });
        let address = listener.local_addr().unwrap();
        let relay = Arc::clone(&state);
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if relay.closed.load(Ordering::SeqCst) {
                    continue;
                }
                let target = *relay.target.lock().unwrap();
                let Ok(far) = TcpStream::connect(target) else {
                    continue;
                };
                near.set_nodelay(true).unwrap();
                far.set_nodelay(true).unwrap();
                let mut sockets = relay.sockets.lock().unwrap();
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to, relay) = (
                        from.try_clone().unwrap(),
                        to.try_clone().unwrap(),
                        Arc::clone(&relay),
                    );
                    std::thread::spawn(move || pass(from, to, &relay));
                }
                sockets.extend([near, far]);
            }
        });
        Relay { address, state }
    }

    /// Cuts everything now.
    pub(crate) fn cut(&self) {
        cut(&self.state);
    }

    /// Cuts everything after so many more bytes, in either direction.
    pub(crate) fn cut_after(&self, bytes: i64) {
        self.state.left.store(bytes, Ordering::SeqCst);
    }

    /// Nobody gets through, or again.
    pub(crate) fn close(&self, closed: bool) {
        self.state.closed.store(closed, Ordering::SeqCst);
        if closed {
            self.cut();
        }
    }

    pub(crate) fn retarget(&self, target: SocketAddr) {
        *self.state.target.lock().unwrap() = target;
    }

    pub(crate) fn cuts(&self) -> u64 {
        self.state.cuts.load(Ordering::SeqCst)
    }
}

fn cut(state: &RelayState) {
    state.cuts.fetch_add(1, Ordering::SeqCst);
    for socket in state.sockets.lock().unwrap().drain(..) {
        socket.shutdown(Shutdown::Both).ok();
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, state: &RelayState) {
    let mut room = vec![0; 64 << 10];
    loop {
        let got = match from.read(&mut room) {
            Ok(0) | Err(_) => break,
            Ok(got) => got,
        };
        let left = state.left.load(Ordering::SeqCst);
        if left >= 0 {
            let now = (got as i64).min(left) as usize;
            to.write_all(&room[..now]).ok();
            if got as i64 >= left {
                state.left.store(-1, Ordering::SeqCst);
                cut(state);
                break;
            }
            state.left.fetch_sub(got as i64, Ordering::SeqCst);
        } else if to.write_all(&room[..got]).is_err() {
            break;
        }
    }
    to.shutdown(Shutdown::Both).ok();
    from.shutdown(Shutdown::Both).ok();
}
