//! The links of a reactor: the ends in `wire`, driven through the reactor's ring.
//!
//! A connection has one receive and at most one send under way. When either fails, or what came makes no sense, it is shut
//! down and given up once both have ended; only then does the end of the link hear of it, since until then the kernel may
//! use memory that it named. The control threads are told and bring another one.
//!
//! Invariants: an end has at most one connection; memory is named to the kernel by one receive (the end's own buffer) and
//! one send (the end's batch); an asker without a connection for [`LOST_MS`] has lost its peer, so that no volume waits
//! longer for it than for a silent disk.
//!
//! Deliberately absent: connecting and accepting (control threads), knowledge of addresses.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{opcode, squeue, types};

use crate::ids::DiskUuid;
use crate::mirror;
use crate::plane::{DiskIndex, DiskUp, Event, LinkStatus, VolumeIndex};
use crate::reactor::{self, Kind, Ring, Tag};
use crate::replica::Reply;
use crate::wire::asker::{self, Asker};
use crate::wire::handshake::{Incarnation, NodeId, Peer};
use crate::wire::server::{Job, Offer, Server};

use super::{Address, Route, Shard, To};

/// An asker without a connection for so long has lost its peer.
const LOST_MS: u64 = 3_000;
/// Links of one reactor.
pub(super) const LINKS_MAX: usize = 1024;

/// What a completion on a connection was for.
const RECEIVED: u32 = 0;
const SENT: u32 = 1;

enum End {
    Asker(Box<Asker>),
    Server(Box<Server>),
}

struct Socket {
    fd: OwnedFd,
    receiving: bool,
    sending: bool,
    /// It is of no use any more: why.
    over: Option<String>,
    /// The kernel was told.
    shut: bool,
}

/// See the module.
pub(super) struct Link {
    node: NodeId,
    /// The reactor at the asking end.
    reactor: u16,
    end: End,
    socket: Option<Socket>,
    /// Counts the connections: a completion of an earlier one is not taken for the present one's.
    uses: u32,
    /// The next connection, until the present one has ended.
    next: Option<(OwnedFd, Peer)>,
    /// The peer's process behind the last connection.
    incarnation: Option<Incarnation>,
    /// When the last connection ended.
    since: u64,
    lost: bool,
    leaving: bool,
    /// Whatever it waits for, the ring will tell.
    settled: bool,
    /// Why the last connection ended.
    reason: Option<String>,
}

/// All of them. A link keeps its number; numbers are used again.
pub(super) struct Links {
    all: Vec<Option<Box<Link>>>,
    /// What askers had to say that volumes must hear, with the link.
    news: VecDeque<(u16, asker::Effect)>,
    // Kept to be used again.
    effects: Vec<asker::Effect>,
    jobs: Vec<Job>,
}

impl Links {
    pub(super) fn new() -> Self {
        Links {
            all: Vec::new(),
            news: VecDeque::with_capacity(64),
            effects: Vec::with_capacity(1024),
            jobs: Vec::with_capacity(1024),
        }
    }

    fn get(&mut self, link: u16) -> Option<&mut Link> {
        self.all.get_mut(usize::from(link))?.as_deref_mut()
    }

    fn find(&self, node: NodeId, reactor: u16, asks: bool) -> Option<u16> {
        let at = self.all.iter().position(|link| {
            link.as_ref().is_some_and(|link| {
                link.node == node && link.reactor == reactor && matches!(link.end, End::Asker(_)) == asks
            })
        })?;
        Some(at as u16)
    }

    /// Puts a new one in. `None`: there are enough.
    fn add(&mut self, node: NodeId, reactor: u16, end: End, now: u64) -> Option<u16> {
        let link = Link {
            node,
            reactor,
            end,
            socket: None,
            uses: 0,
            next: None,
            incarnation: None,
            since: now,
            lost: true,
            leaving: false,
            settled: false,
            reason: None,
        };
        let at = match self.all.iter().position(Option::is_none) {
            Some(at) => at,
            None if self.all.len() < LINKS_MAX => {
                self.all.push(None);
                self.all.len() - 1
            }
            None => return None,
        };
        self.all[at] = Some(Box::new(link));
        Some(at as u16)
    }

    /// A disk with this uuid at the other end of a link, which can be asked now.
    pub(super) fn reach(&self, uuid: DiskUuid) -> Option<Route> {
        self.all.iter().enumerate().find_map(|(link, there)| {
            let End::Asker(asker) = &there.as_ref()?.end else {
                return None;
            };
            let (notice, stay) = asker.disks().find(|(notice, _)| notice.uuid == uuid)?;
            Some(Route::Far {
                link: link as u16,
                disk: notice.disk,
                stay,
            })
        })
    }

    /// Nothing waits that would not announce itself by the ring. To be asked after [`Shard::poll_links`].
    pub(super) fn may_sleep(&self) -> bool {
        self.news.is_empty() && self.all.iter().flatten().all(|link| link.settled)
    }

    /// Something was heard that is to be worked off by `carry`.
    pub(super) fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    /// Whether a connection has I/O under way.
    fn busy(&self) -> bool {
        self.all.iter().flatten().any(|link| link.socket.is_some())
    }

    pub(super) fn status(&self) -> Vec<LinkStatus> {
        let status = |link: &Link| {
            let (asks, pending, counts) = match &link.end {
                End::Asker(asker) => (true, asker.pending(), asker.counts()),
                End::Server(server) => (false, 0, server.counts()),
            };
            LinkStatus {
                node: link.node,
                reactor: link.reactor,
                asks,
                connected: link.socket.is_some(),
                pending,
                counts,
            }
        };
        self.all.iter().flatten().map(|link| status(link)).collect()
    }
}

/// What became of a link in [`Link::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Became {
    Same,
    /// It needs another connection.
    Cut,
    /// It is over.
    Gone,
}

impl Link {
    /// The connection is of no use any more.
    fn give_up(&mut self, why: impl FnOnce() -> String) {
        if let Some(socket) = &mut self.socket
            && socket.over.is_none()
        {
            socket.over = Some(why());
        }
    }

    /// Receives and sends as far as there is anything to do, ends what is over, begins what is next.
    fn poll(&mut self, at: u16, ring: &mut Ring, now: u64, effects: &mut Vec<asker::Effect>) -> Became {
        let mut became = Became::Same;
        if let Some(socket) = &mut self.socket
            && socket.over.is_some()
        {
            if !socket.receiving && !socket.sending {
                if socket.shut {
                    // What tells the kernel names the descriptor, and may not have been submitted. Should that fail, the
                    // loop's own submit fails as well, and says so.
                    ring.submit().ok();
                }
                self.reason = socket.over.take();
                self.socket = None;
                self.since = now;
                match &mut self.end {
                    End::Asker(asker) => {
                        asker.end(effects);
                        became = Became::Cut;
                    }
                    End::Server(server) => server.end(),
                }
            } else if !socket.shut {
                let entry = opcode::Shutdown::new(types::Fd(socket.fd.as_raw_fd()), libc::SHUT_RDWR)
                    .build()
                    .flags(squeue::Flags::SKIP_SUCCESS);
                // SAFETY: no memory is named; the descriptor stays open until this was submitted (above).
                socket.shut = unsafe { ring.push(entry, Tag::NOBODY) }.is_ok();
            }
        }
        if self.socket.is_none() {
            if let Some((fd, peer)) = self.next.take() {
                self.begin(fd, &peer, effects);
                became = Became::Same;
            } else if let End::Asker(asker) = &mut self.end
                && !self.lost
                && (self.leaving || now.saturating_sub(self.since) >= LOST_MS)
            {
                self.lost = true;
                asker.lose(effects);
            }
        }
        if self.socket.as_ref().is_some_and(|socket| socket.over.is_none()) {
            self.io(at, ring, effects);
        }
        self.settled = match &self.socket {
            None => self.next.is_none(),
            Some(socket) if socket.over.is_some() => socket.shut && (socket.receiving || socket.sending),
            Some(socket) => socket.receiving && (socket.sending || !self.end.owes()),
        };
        let over = self.leaving
            && self.socket.is_none()
            && match &self.end {
                End::Asker(asker) => self.lost && asker.pending() == 0,
                End::Server(server) => server.quiet(),
            };
        if over { Became::Gone } else { became }
    }

    fn begin(&mut self, fd: OwnedFd, peer: &Peer, effects: &mut Vec<asker::Effect>) {
        match &mut self.end {
            End::Asker(asker) => {
                if self.incarnation.is_some_and(|known| known != peer.incarnation) {
                    // What the other process had done or promised is known to no one.
                    asker.lose(effects);
                }
                asker.begin(&peer.key);
            }
            End::Server(server) => server.begin(&peer.key),
        }
        self.incarnation = Some(peer.incarnation);
        self.lost = false;
        self.uses = self.uses.wrapping_add(1);
        self.socket = Some(Socket {
            fd,
            receiving: false,
            sending: false,
            over: None,
            shut: false,
        });
    }

    fn tag(&self, at: u16, what: u32) -> Tag {
        Tag {
            kind: Kind::Connection,
            owner: u32::from(at),
            index: self.uses << 1 | what,
        }
    }

    /// Gives the kernel one receive and one send, unless it has them.
    fn io(&mut self, at: u16, ring: &mut Ring, effects: &mut Vec<asker::Effect>) {
        let (receive, send) = (self.tag(at, RECEIVED), self.tag(at, SENT));
        let socket = self.socket.as_mut().expect("the caller looked");
        let fd = types::Fd(socket.fd.as_raw_fd());
        if !socket.receiving {
            let (room, bytes) = match &mut self.end {
                End::Asker(asker) => asker.room(),
                End::Server(server) => server.room(),
            };
            let entry = opcode::Recv::new(fd, room, bytes as u32).build();
            // SAFETY: the room is the end's own buffer, which it does not look at before it is told what came, and which is
            // kept until the receive has ended: a link goes only without a connection, a connection only without I/O (and
            // a reactor that stops waits for both, see `close_links`). The same holds for the descriptor.
            socket.receiving = unsafe { ring.push(entry, receive) }.is_ok();
        }
        if !socket.sending {
            let batch = match &mut self.end {
                End::Asker(asker) => asker.gather(effects),
                End::Server(server) => server.gather(),
            };
            if let Some(batch) = batch {
                let entry = opcode::SendMsg::new(fd, batch.message())
                    .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
                    .build();
                // SAFETY: the message and what it names stay as they are until the send has ended: the batch is told then
                // and only then, and the ends keep the memory of the requests in it until that (their invariants).
                socket.sending = unsafe { ring.push(entry, send) }.is_ok();
            }
        }
    }
}

impl End {
    /// Something is gathered and has not been sent.
    fn owes(&self) -> bool {
        match self {
            End::Asker(asker) => asker.owes(),
            End::Server(server) => server.owes(),
        }
    }
}

impl Shard {
    /// This reactor will ask disks of a node.
    pub(super) fn add_asker(&mut self, node: NodeId) -> std::io::Result<()> {
        let reactor = self.number as u16;
        if let Some(at) = self.links.find(node, reactor, true) {
            // It was to go, and it stays.
            self.links.get(at).expect("found").leaving = false;
            return Ok(());
        }
        let end = End::Asker(Box::new(Asker::new()?));
        self.links
            .add(node, reactor, end, self.now)
            .ok_or_else(|| std::io::Error::other("this reactor has as many links as it can have"))?;
        self.tell(Event::Dial {
            node,
            reactor,
            reason: String::new(),
        });
        Ok(())
    }

    /// A connection that this node dialed for this reactor.
    pub(super) fn dialed(&mut self, fd: OwnedFd, peer: Peer) {
        if let Some(at) = self.links.find(peer.node, self.number as u16, true) {
            self.bring(at, fd, peer);
        }
    }

    /// A connection that a reactor of another node dialed.
    pub(super) fn accepted(&mut self, fd: OwnedFd, peer: Peer, reactor: u16) {
        let at = match self.links.find(peer.node, reactor, false) {
            Some(at) => at,
            None => {
                let Ok(mut server) = Server::new() else { return };
                for up in self.disks.iter().flatten() {
                    server.offer(up.index.0, self::offer(up));
                }
                let end = End::Server(Box::new(server));
                let Some(at) = self.links.add(peer.node, reactor, end, self.now) else {
                    return;
                };
                at
            }
        };
        self.bring(at, fd, peer);
    }

    /// The next connection of a link: it begins when the present one has ended.
    fn bring(&mut self, at: u16, fd: OwnedFd, peer: Peer) {
        let link = self.links.get(at).expect("found before");
        link.leaving = false;
        link.next = Some((fd, peer));
        link.give_up(|| "the peer connected anew".into());
        self.poll_link(at);
    }

    /// No more links with a node: its disks are down for this reactor.
    pub(super) fn forget_node(&mut self, node: NodeId) {
        for at in 0..self.links.all.len() as u16 {
            if let Some(link) = self.links.get(at)
                && link.node == node
            {
                link.leaving = true;
                link.next = None;
                link.give_up(|| "the node was taken out".into());
                self.poll_link(at);
            }
        }
    }

    /// A disk of this node can be reached, or not any more: the peers are told.
    pub(super) fn offer_disk(&mut self, disk: DiskIndex, up: Option<&DiskUp>) {
        for link in self.links.all.iter_mut().flatten() {
            if let End::Server(server) = &mut link.end {
                server.offer(disk.0, up.and_then(offer));
            }
        }
    }

    /// Asks a disk at the other end of a link.
    pub(super) fn ask_far(
        &mut self,
        tag: u64,
        volume: VolumeIndex,
        (link, disk, stay): (u16, u16, u32),
        header: crate::replica::Header,
        request: crate::replica::Request,
    ) -> bool {
        let Some(Link {
            end: End::Asker(asker),
            ..
        }) = self.links.get(link)
        else {
            return false;
        };
        asker.ask(tag, u32::from(volume.0), (disk, stay), header, request)
    }

    /// Nobody wants the answers of a far disk to a volume any more.
    pub(super) fn abandon_far(&mut self, volume: VolumeIndex, at: u16, disk: u16) {
        let mut effects = std::mem::take(&mut self.links.effects);
        if let Some(link) = self.links.get(at)
            && let End::Asker(asker) = &mut link.end
            && asker.abandon(u32::from(volume.0), disk, &mut effects)
        {
            // Memory is being read by a send that may never end by itself.
            link.give_up(|| "a disk is silent in the middle of a send".into());
        }
        self.hear(at, &mut effects);
        self.links.effects = effects;
    }

    /// An answer to a job that came by a link.
    pub(super) fn answer_far(&mut self, link: u16, slot: u16, reply: Reply) {
        let mut jobs = std::mem::take(&mut self.links.jobs);
        if let Some(link) = self.links.get(link)
            && let End::Server(server) = &mut link.end
        {
            server.answered(slot, reply, &mut jobs);
        }
        self.begin_jobs(link, &mut jobs);
        self.links.jobs = jobs;
    }

    fn begin_jobs(&mut self, link: u16, jobs: &mut Vec<Job>) {
        for job in jobs.drain(..) {
            let tag = Address {
                shard: self.number,
                to: To::Link { link, slot: job.slot },
            }
            .pack();
            let disk = DiskIndex(job.disk);
            self.route(tag, disk, &job.header, &job.request);
        }
    }

    /// Something happened on a connection.
    pub(super) fn connection_event(&mut self, event: reactor::Event) {
        let at = event.tag.owner as u16;
        let (mut jobs, mut effects) = (
            std::mem::take(&mut self.links.jobs),
            std::mem::take(&mut self.links.effects),
        );
        if let Some(link) = self.links.get(at)
            && link.uses & (u32::MAX >> 1) == event.tag.index >> 1
            && let Some(socket) = &mut link.socket
        {
            let what = event.tag.index & 1;
            if what == RECEIVED {
                socket.receiving = false;
            } else {
                socket.sending = false;
            }
            let again = matches!(event.result, r if r == -libc::EINTR || r == -libc::EAGAIN);
            if socket.over.is_some() || again {
                // Nothing came that counts.
            } else if event.result <= 0 {
                let result = event.result;
                link.give_up(|| match result {
                    0 => "the peer closed the connection".into(),
                    errno => std::io::Error::from_raw_os_error(-errno).to_string(),
                });
            } else {
                let bytes = event.result as usize;
                let outcome = match (&mut link.end, what) {
                    (End::Asker(asker), RECEIVED) => asker.received(bytes, &mut effects),
                    (End::Server(server), RECEIVED) => server.received(bytes, &mut jobs),
                    (End::Asker(asker), _) => {
                        asker.sent(bytes, &mut effects);
                        Ok(())
                    }
                    (End::Server(server), _) => {
                        server.sent(bytes);
                        Ok(())
                    }
                };
                if let Err(error) = outcome {
                    link.give_up(|| error.to_string());
                }
            }
        }
        self.begin_jobs(at, &mut jobs);
        self.hear(at, &mut effects);
        (self.links.jobs, self.links.effects) = (jobs, effects);
    }

    /// Receives and sends on all connections, as far as there is anything to do.
    pub(super) fn poll_links(&mut self) {
        for at in 0..self.links.all.len() as u16 {
            self.poll_link(at);
        }
    }

    fn poll_link(&mut self, at: u16) {
        let mut effects = std::mem::take(&mut self.links.effects);
        if let Some(link) = self
            .links
            .all
            .get_mut(usize::from(at))
            .and_then(Option::as_deref_mut)
        {
            let became = link.poll(at, &mut self.ring, self.now, &mut effects);
            let (node, reactor, leaving) = (link.node, link.reactor, link.leaving);
            let reason = link.reason.take();
            self.hear(at, &mut effects);
            match became {
                // The link's number is another's only when nobody speaks of it any more.
                Became::Gone if self.links.news.is_empty() => self.links.all[usize::from(at)] = None,
                Became::Cut if !leaving => self.tell(Event::Dial {
                    node,
                    reactor,
                    reason: reason.unwrap_or_default(),
                }),
                _ => {}
            }
        }
        self.links.effects = effects;
    }

    /// Takes what an asker has to say: answers go their way, the rest is worked off by `carry`.
    fn hear(&mut self, at: u16, effects: &mut Vec<asker::Effect>) {
        for effect in effects.drain(..) {
            match effect {
                asker::Effect::Answer { tag, reply } => self.reply(tag, reply),
                news => self.links.news.push_back((at, news)),
            }
        }
    }

    /// Tells the volumes what was heard of far disks.
    pub(super) fn carry_news(&mut self) -> bool {
        let mut moved = false;
        while let Some((link, news)) = self.links.news.pop_front() {
            moved = true;
            for position in 0..self.present.len() {
                let index = self.present[position];
                match news {
                    asker::Effect::Up(_) => self.connect(index),
                    asker::Effect::Down(uuid) => {
                        self.far_down(index, |route, disk| {
                            disk == uuid && matches!(route, Route::Far { link: l, .. } if l == link)
                        });
                    }
                    asker::Effect::Abandoned { group, disk } if group == u32::from(index.0) => {
                        self.far_down(index, |route, _| {
                            matches!(route, Route::Far { link: l, disk: d, .. } if (l, d) == (link, disk))
                        });
                    }
                    asker::Effect::Abandoned { .. } | asker::Effect::Answer { .. } => {}
                }
            }
        }
        moved
    }

    /// The volume's far disk that is meant can not be asked any more.
    fn far_down(&mut self, index: VolumeIndex, meant: impl Fn(Route, DiskUuid) -> bool) {
        let Some(volume) = &mut self.volumes[usize::from(index.0)] else {
            return;
        };
        let found = volume
            .mirror
            .disks()
            .zip(&volume.routes)
            .position(|(uuid, route)| route.is_some_and(|route| meant(route, uuid)));
        if let Some(number) = found {
            volume.routes[number] = None;
            let uuid = volume.mirror.disk(mirror::DiskIndex(number as u16));
            self.with_mirror(index, |mirror, out| mirror.disk_down(uuid, out));
        }
    }

    /// Before the reactor ends: the kernel uses no memory of the links any more.
    pub(super) fn close_links(&mut self) {
        for link in self.links.all.iter_mut().flatten() {
            (link.leaving, link.next) = (true, None);
            link.give_up(|| "the reactor ends".into());
        }
        while self.links.busy() {
            self.poll_links();
            if let Err(error) = self.ring.wait(Some(std::time::Duration::from_millis(10))) {
                panic!("io_uring has failed: {error}");
            }
            self.take_ring_events();
        }
    }
}

fn offer(up: &DiskUp) -> Option<Offer> {
    // A disk that keeps nothing has nothing to send.
    (!up.null).then_some(Offer {
        uuid: up.uuid,
        boot: up.boot,
        power: up.power,
    })
}
