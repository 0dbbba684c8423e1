//! The data plane as its control threads see it: a handle that starts reactors and sends them commands.
//!
//! Every disk and every volume belongs to one reactor, given round-robin by its index. What the control threads want done
//! goes there as a command through the reactor's mailbox; what a reactor has to say comes back as an [`Event`].
//! None of this is on the path of a guest's request.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::config::{Outcome, Proposal, VolumeConfig};
use crate::disk::Disk;
use crate::frontend::Queue;
use crate::ids::{BootId, DiskUuid, Generation, PowerId, VolumeId};
use crate::mirror::MirrorStatus;
use crate::reactor::crowd::{Crowd, Lookout, own_waiting};
use crate::reactor::mailbox::{Sender, Waker, mailbox};
use crate::reactor::pin::{Pinned, spawn_pinned};
use crate::replica::ChunkRef;
use crate::shard::{Message, Seat, Shard};
use crate::store::{Store, StoreStats};
use crate::wire::LinkCounts;
use crate::wire::handshake::{self, Handshake, HandshakeError, Local, NodeId, PARAMS, Params, Peer, Purpose};
use crate::wire::socket;

/// Most disks of a node.
pub const DISKS_MAX: usize = 256;
/// Most volumes of a node.
pub const VOLUMES_MAX: usize = 4096;
/// Messages a reactor's mailbox holds.
const MAILBOX: usize = 4096;

/// A disk of this node, densely numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskIndex(pub u16);

/// A volume of this node, densely numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeIndex(pub u16);

/// What answers for a disk on its reactor.
pub enum DiskService {
    /// An opened store and the device under it.
    Store(Box<Store>, Box<dyn Disk>),
    /// Nothing: everything is done at once and nothing is kept.
    Null,
}

/// A disk is there, for all who replicate to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskUp {
    /// Its number on this node.
    pub index: DiskIndex,
    /// Which disk it is.
    pub uuid: DiskUuid,
    /// Its present boot.
    pub boot: BootId,
    /// Its present span of power.
    pub power: PowerId,
    /// I/O on it ends within the call that submits it, so that none can be left outstanding.
    pub inline: bool,
    /// It keeps nothing, so that there is no point in copying what is written to it.
    pub null: bool,
}

/// What a reactor has to say. There is at most one proposal outstanding a volume and one failure a disk, so the channel
/// holds a bounded number of these.
#[derive(Debug)]
pub enum Event {
    /// A volume's owner asks for a change.
    Proposal(VolumeIndex, VolumeId, Proposal),
    /// A disk failed by itself: what it completed before may be lost, so it must not come back as if it were not. Its
    /// [`Event::DiskFailed`] follows.
    Distrusted(DiskIndex),
    /// A disk is out of service; its store answers nothing any more and the device was let go.
    DiskFailed {
        /// Which.
        disk: DiskIndex,
        /// Why.
        reason: String,
    },
    /// A volume is being served.
    Attached {
        /// Which.
        volume: VolumeIndex,
        /// Acknowledged, unflushed writes may be gone with the power: a guest that was not restarted must not go on.
        power_lost: bool,
    },
    /// A disk has answered nothing for too long.
    Silent(DiskIndex),
    /// A quarter of a generation's versions are used: take the next one for the same owner, and say so with
    /// [`Plane::renewed`]. Comes again until then.
    NewGeneration(VolumeIndex),
    /// A reactor wants a connection to a node ([`Plane::dial`] makes one): its link is new, or has just lost the one it had.
    /// Comes once for each connection; a control thread that does not succeed tries again by itself, and waits a little where
    /// one connection after the other ends.
    Dial {
        /// To which node.
        node: NodeId,
        /// For which reactor of this node.
        reactor: u16,
        /// Why the last connection ended.
        reason: String,
    },
    /// Another owner has the volume: all its I/O fails now.
    Fenced(VolumeIndex),
    /// The last replicas of a chunk forgot acknowledged writes: all I/O fails until the volume is attached anew.
    Failed(VolumeIndex),
}

/// Counters of one reactor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReactorStats {
    /// The core it is pinned to.
    pub core: usize,
    /// Turns of the loop.
    pub turns: u64,
    /// Of these, turns that found work.
    pub busy_turns: u64,
    /// Times it slept.
    pub sleeps: u64,
    /// Calls of `io_uring_enter`.
    pub enters: u64,
    /// Requests taken from guests.
    pub requests: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Bytes copied from guest memory into private memory (once a write).
    pub copied_in: u64,
    /// Bytes copied from private memory into guest memory (reads from disks that answer late, and unaligned ones).
    pub copied_out: u64,
    /// Times a request had to wait for an operation slot or a buffer.
    pub waits: u64,
    /// Guest queues polled now.
    pub queues_polled: u64,
    /// Guest queues that wait for a kick.
    pub queues_idle: u64,
    /// Large buffers (64 KiB) that requests in hand have now. What a hung disk still holds of ended ones is not counted.
    pub buffers_lent: u64,
}

/// One end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkStatus {
    /// The node at the other end.
    pub node: NodeId,
    /// The reactor that asks: of this node if `asks`, else of the other.
    pub reactor: u16,
    /// Requests go from here to there; else from there to here.
    pub asks: bool,
    /// There is a connection.
    pub connected: bool,
    /// Requests asked and not answered.
    pub pending: usize,
    /// Counters.
    pub counts: LinkCounts,
}

/// What there is to know of one reactor and what it owns.
#[derive(Debug, Default)]
pub struct ShardStatus {
    /// The reactor.
    pub reactor: ReactorStats,
    /// Its disks.
    pub disks: Vec<(DiskIndex, StoreStats)>,
    /// Its volumes.
    pub volumes: Vec<(VolumeIndex, MirrorStatus)>,
    /// Its ends of links.
    pub links: Vec<LinkStatus>,
}

/// What a reactor is told. Replies go to the senders inside; a reactor that is gone drops them.
pub(crate) enum Command {
    AddDisk(DiskUp, DiskService, mpsc::Sender<io::Result<()>>),
    /// On every reactor: a replica's disk can be reached.
    DiskUp(DiskUp),
    /// On every reactor: it can not be reached any more.
    DiskDown(DiskIndex),
    /// On its reactor: as if it had died.
    FailDisk(DiskIndex),
    /// On its reactor: flush, mark clean, let go. False: it failed meanwhile.
    CloseDisk(DiskIndex, mpsc::Sender<bool>),
    /// On its reactor: replicas whose volume or place is gone.
    DropChunks(DiskIndex, Vec<ChunkRef>, Generation),
    AddVolume(VolumeIndex, VolumeConfig, Vec<DiskUp>),
    Decided(VolumeIndex, Outcome),
    Reconfigured(VolumeIndex, VolumeConfig),
    Renewed(VolumeIndex, VolumeConfig),
    /// Quiesce, flush, forget.
    RemoveVolume(VolumeIndex, mpsc::Sender<()>),
    StartQueue(QueueKey, VolumeIndex, Box<Queue>),
    StopQueue(QueueKey, mpsc::Sender<Box<Queue>>),
    /// Disks of this node will be asked.
    Ask(NodeId, mpsc::Sender<io::Result<()>>),
    Dialed(OwnedFd, Peer),
    /// With the reactor of the peer that asks.
    Accepted(OwnedFd, Peer, u16),
    ForgetNode(NodeId),
    Status(mpsc::Sender<ShardStatus>),
    Stop,
}

/// Names a guest's queue for the time it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueKey {
    /// The device, unique in this process.
    pub device: u32,
    /// The queue's index in the device.
    pub index: u16,
}

/// A reactor that panics takes the process with it: whoever waits for its answer would wait for ever, and what it has in
/// hand is safe only as after a crash.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// The parameters of a data connection: which reactor of the dialer asks.
pub fn reactor_params(reactor: u16) -> Params {
    let mut params = [0; PARAMS];
    params[..2].copy_from_slice(&reactor.to_le_bytes());
    params
}

fn params_reactor(params: &Params) -> u16 {
    u16::from_le_bytes([params[0], params[1]])
}

struct Port {
    mailbox: Sender<Message>,
    thread: Option<Pinned<()>>,
}

/// Until when the owners on this node may answer a read from one replica.
///
/// One word that all reactors look at when answers to reads come in: milliseconds since the process's data plane was
/// started, by the monotonic clock. A plane begins without an end: one node alone has no other owner to fear.
pub(crate) struct Lease {
    started: Instant,
    until: AtomicU64,
}

impl Lease {
    fn new() -> Self {
        Lease {
            started: Instant::now(),
            until: AtomicU64::new(u64::MAX),
        }
    }

    fn set(&self, until: Instant) {
        let until = until.saturating_duration_since(self.started);
        // Alone it says nothing about other memory, so no order is needed.
        self.until.store(until.as_millis() as u64, Ordering::Relaxed);
    }

    /// Whether it holds now. Looks at the clock unless there is no end.
    pub(crate) fn holds(&self) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until == u64::MAX || (self.started.elapsed().as_millis() as u64) < until
    }
}

/// See the module. Dropping it stops the reactors.
pub struct Plane {
    ports: Vec<Port>,
    lease: Arc<Lease>,
    _lookout: Lookout,
}

impl Plane {
    /// Starts one pinned reactor on each of `cores`. What they have to say comes out of the receiver.
    ///
    /// # Errors
    /// When a core does not exist or is not ours, or the kernel refuses a ring.
    pub fn start(cores: &[usize]) -> io::Result<(Self, mpsc::Receiver<Event>)> {
        let (events, receiver) = mpsc::channel();
        let wakers = cores
            .iter()
            .map(|_| Waker::new())
            .collect::<io::Result<Vec<_>>>()?;
        let (senders, receivers): (Vec<_>, Vec<_>) = wakers
            .iter()
            .map(|waker| mailbox::<Message>(MAILBOX, waker))
            .unzip();
        let lease = Arc::new(Lease::new());
        let (mut ports, mut looked_after) = (Vec::new(), Vec::new());
        for (number, (receiver, &core)) in receivers.into_iter().zip(cores).enumerate() {
            let (peers, waker, events) = (senders.clone(), Arc::clone(&wakers[number]), events.clone());
            let (lease, crowd) = (Arc::clone(&lease), Arc::new(Crowd::default()));
            let seat = Seat {
                number,
                core,
                crowd: Arc::clone(&crowd),
            };
            let (started, outcome) = mpsc::channel();
            let thread = spawn_pinned(&format!("reactor{number}"), core, move || {
                match Shard::new(seat, waker, receiver, peers, events, lease) {
                    Ok(shard) => {
                        started.send(Ok(own_waiting().ok())).ok();
                        let _guard = AbortOnPanic;
                        shard.run();
                    }
                    Err(error) => {
                        started.send(Err(error)).ok();
                    }
                }
            })
            .map_err(io::Error::other)?;
            let waiting = outcome
                .recv()
                .unwrap_or_else(|_| Err(io::Error::other("the reactor died while it started")))?;
            // A kernel that does not count it leaves the core to the reactor.
            looked_after.extend(waiting.map(|waiting| (waiting, crowd)));
            ports.push(Port {
                mailbox: senders[number].clone(),
                thread: Some(thread),
            });
        }
        let lookout = Lookout::start(looked_after)?;
        let plane = Plane {
            ports,
            lease,
            _lookout: lookout,
        };
        Ok((plane, receiver))
    }

    fn send(&self, shard: usize, command: Command) {
        // Control threads may wait for room; a reactor never does.
        let mut message = Message::Command(Box::new(command));
        while let Err(back) = self.ports[shard].mailbox.send(message) {
            message = back;
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn ask<T>(&self, shard: usize, make: impl FnOnce(mpsc::Sender<T>) -> Command) -> Option<T> {
        let (sender, receiver) = mpsc::channel();
        self.send(shard, make(sender));
        receiver.recv().ok()
    }

    fn home(&self, index: u16) -> usize {
        usize::from(index) % self.ports.len()
    }

    /// Puts a disk into service and tells all volumes.
    ///
    /// # Errors
    /// When the reactor can not drive the device.
    pub fn add_disk(&self, up: DiskUp, service: DiskService) -> io::Result<()> {
        self.ask(self.home(up.index.0), |reply| {
            Command::AddDisk(up, service, reply)
        })
        .unwrap_or_else(|| Err(io::Error::other("the reactor has ended")))?;
        for shard in 0..self.ports.len() {
            self.send(shard, Command::DiskUp(up));
        }
        Ok(())
    }

    /// Takes a disk out of service as if it had died: everything on it is refused from now on. When its last I/O has ended
    /// and the device was let go, [`Event::DiskFailed`] comes.
    pub fn fail_disk(&self, index: DiskIndex) {
        self.send(self.home(index.0), Command::FailDisk(index));
    }

    /// Tells all volumes that a disk can not be reached any more and touches no memory of theirs.
    pub fn disk_down(&self, index: DiskIndex) {
        for shard in 0..self.ports.len() {
            self.send(shard, Command::DiskDown(index));
        }
    }

    /// Begins to flush a disk, mark it clean and let it go. The receiver hears when it is over; false: it failed before.
    pub fn close_disk(&self, index: DiskIndex) -> mpsc::Receiver<bool> {
        let (sender, receiver) = mpsc::channel();
        self.send(self.home(index.0), Command::CloseDisk(index, sender));
        receiver
    }

    /// Gives back the space of replicas that no volume has any more, in the name of `generation`: the volume's own, or
    /// [`Generation::LAST`] if there is no such volume. In the name of an older one nothing is dropped.
    pub fn drop_chunks(&self, index: DiskIndex, chunks: Vec<ChunkRef>, generation: Generation) {
        self.send(self.home(index.0), Command::DropChunks(index, chunks, generation));
    }

    /// Begins to own a volume: seal, compare, serve.
    pub fn add_volume(&self, index: VolumeIndex, config: VolumeConfig, disks: Vec<DiskUp>) {
        self.send(self.home(index.0), Command::AddVolume(index, config, disks));
    }

    /// Answers a proposal.
    pub fn decided(&self, index: VolumeIndex, outcome: Outcome) {
        self.send(self.home(index.0), Command::Decided(index, outcome));
    }

    /// Tells the owner of a change that it did not propose.
    pub fn reconfigured(&self, index: VolumeIndex, config: VolumeConfig) {
        self.send(self.home(index.0), Command::Reconfigured(index, config));
    }

    /// Tells the owner that it was given the next generation: it goes on under that one.
    pub fn renewed(&self, index: VolumeIndex, config: VolumeConfig) {
        self.send(self.home(index.0), Command::Renewed(index, config));
    }

    /// Begins to end owning a volume: what is in flight ends, everything is flushed. Its queues must have been stopped. The
    /// receiver hears when it is over.
    pub fn remove_volume(&self, index: VolumeIndex) -> mpsc::Receiver<()> {
        let (sender, receiver) = mpsc::channel();
        self.send(self.home(index.0), Command::RemoveVolume(index, sender));
        receiver
    }

    /// Gives a guest's queue to the volume's reactor.
    pub fn start_queue(&self, key: QueueKey, volume: VolumeIndex, queue: Box<Queue>) {
        self.send(self.home(volume.0), Command::StartQueue(key, volume, queue));
    }

    /// Takes a guest's queue back, once nothing of it is in flight. `None` if it was not running.
    pub fn stop_queue(&self, key: QueueKey, volume: VolumeIndex) -> Option<Box<Queue>> {
        self.ask(self.home(volume.0), |reply| Command::StopQueue(key, reply))
    }

    /// Every reactor will reach the disks of a node, as soon as it has a connection: [`Event::Dial`] comes for each. The
    /// disks need not be named: whoever answers there says which it has, and volumes find them by their uuid.
    ///
    /// # Errors
    /// When a reactor has no memory or no room for another link.
    pub fn add_node(&self, node: NodeId) -> io::Result<()> {
        for shard in 0..self.ports.len() {
            self.ask(shard, |reply| Command::Ask(node, reply))
                .unwrap_or_else(|| Err(io::Error::other("the reactor has ended")))?;
        }
        Ok(())
    }

    /// Answers an [`Event::Dial`]: connects, proves, and hands the connection to the reactor. Blocks for up to `limit`, so
    /// not a thing for the thread that takes the events.
    ///
    /// # Errors
    /// Nobody there, or not who should be: wait a little and try again.
    pub fn dial(
        &self,
        local: Local,
        node: NodeId,
        reactor: u16,
        address: SocketAddr,
        limit: Duration,
    ) -> Result<(), HandshakeError> {
        let begun = Instant::now();
        let mut socket = TcpStream::connect_timeout(&address, limit)?;
        socket::prepare(&socket)?;
        let shake = Handshake::dial(local, Purpose::Data, reactor_params(reactor), Some(node));
        let left = limit.saturating_sub(begun.elapsed());
        let peer = handshake::run(&mut socket, shake, left)?;
        self.send(self.home(reactor), Command::Dialed(socket.into(), peer));
        Ok(())
    }

    /// Takes a connection of purpose [`Purpose::Data`] that was accepted and has proven itself. (A listener tells no
    /// parameters of its own for this purpose: 32 zeros.)
    ///
    /// # Errors
    /// The socket takes no options: it has ended already.
    pub fn accept(&self, socket: TcpStream, peer: Peer) -> io::Result<()> {
        socket::prepare(&socket)?;
        let reactor = params_reactor(&peer.params);
        let home = self.home(reactor);
        self.send(home, Command::Accepted(socket.into(), peer, reactor));
        Ok(())
    }

    /// Ends all links to and from a node: its disks are down.
    pub fn forget_node(&self, node: NodeId) {
        for shard in 0..self.ports.len() {
            self.send(shard, Command::ForgetNode(node));
        }
    }

    /// Owners here may answer reads from one replica until then; after it, reads are confirmed with every required replica.
    /// Whoever calls this has made sure that no volume was given to another owner while it is attached here.
    pub fn set_lease(&self, until: Instant) {
        self.lease.set(until);
    }

    /// What all reactors know.
    pub fn status(&self) -> Vec<ShardStatus> {
        (0..self.ports.len())
            .filter_map(|shard| self.ask(shard, Command::Status))
            .collect()
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        for shard in 0..self.ports.len() {
            self.send(shard, Command::Stop);
        }
        for port in &mut self.ports {
            if let Some(thread) = port.thread.take() {
                // A reactor that panicked has said so already; there is nothing left to stop.
                drop(thread.join());
            }
        }
    }
}
