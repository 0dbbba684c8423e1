//! Requests from owners to replicas and answers back: on this reactor, and to and from others.
//!
//! Nothing here calls back into what called it: effects that would are queued and worked off by [`Shard::carry`], so a
//! turn's depth is bounded whatever happens in it.

use crate::disk::Busy;
use crate::ids::{BLOCKS_PER_EXTENT, EXTENTS_PER_REGION};
use crate::mirror::{self, Mirror};
use crate::plane::{DiskIndex, Event, VolumeIndex};
use crate::replica::{ExtentDigest, Header, Reply, Request, Sealed, Status};
use crate::store::{self, Tag};

use super::{Address, Finish, Home, Message, Route, Shard, To};

impl Shard {
    /// Carries requests and answers until nothing moves.
    pub(super) fn carry(&mut self) {
        loop {
            let mut moved = false;
            while let Some((volume, name, finish)) = self.finished.pop_front() {
                moved = true;
                self.finish(volume, name, finish);
            }
            // Once per round, so that everything asked in it shares a journal block.
            while let Some(disk) = self.touched.pop() {
                moved = true;
                if let Home::Store(served) = &mut self.homes[usize::from(disk.0)] {
                    served.touched = false;
                    served.store.flush_batch(&mut self.store_effects);
                    self.apply_store(disk);
                }
            }
            while let Some((disk, completion)) = self.completions.pop_front() {
                moved = true;
                if let Home::Store(served) = &mut self.homes[usize::from(disk.0)] {
                    served.store.completed(completion, &mut self.store_effects);
                    self.apply_store(disk);
                    self.touch(disk);
                }
            }
            if !self.replies.is_empty() {
                self.look_at_lease();
            }
            // Those that come meanwhile are for the next round, which looks at the lease anew.
            for _ in 0..self.replies.len() {
                if let Some((address, reply)) = self.replies.pop_front() {
                    moved = true;
                    self.answered(address, reply);
                }
            }
            moved |= self.carry_news();
            if !self.ops.waiting_is_empty() {
                self.retry_waiting();
            }
            let quiet = self.finished.is_empty()
                && self.touched.is_empty()
                && self.completions.is_empty()
                && self.replies.is_empty();
            if !moved && quiet {
                return;
            }
        }
    }

    /// A read's answer counts while the lease holds, looked up after the answer came: the process may have been stopped for
    /// any time in between.
    #[inline]
    pub(super) fn look_at_lease(&mut self) {
        let leased = self.lease.holds();
        if leased != self.leased {
            self.leased = leased;
            for position in 0..self.present.len() {
                let index = self.present[position];
                self.with_mirror(index, |mirror, out| mirror.set_leased(leased, out));
            }
        }
    }

    /// A store was asked something: its batch is to be closed this round.
    #[inline]
    pub(super) fn touch(&mut self, disk: DiskIndex) {
        if let Home::Store(served) = &mut self.homes[usize::from(disk.0)]
            && !served.touched
        {
            served.touched = true;
            self.touched.push(disk);
        }
    }

    /// Calls into a volume's mirror and does what it wants done.
    pub(super) fn with_mirror(
        &mut self,
        index: VolumeIndex,
        call: impl FnOnce(&mut Mirror, &mut Vec<mirror::Effect>),
    ) {
        if let Some(volume) = &mut self.volumes[usize::from(index.0)] {
            call(&mut volume.mirror, &mut self.mirror_effects);
            self.apply_mirror(index);
        }
    }

    /// Does what the volume's mirror wants done, in order.
    pub(super) fn apply_mirror(&mut self, index: VolumeIndex) {
        let mut effects = std::mem::take(&mut self.mirror_effects);
        for effect in effects.drain(..) {
            match effect {
                mirror::Effect::Send {
                    disk,
                    id,
                    ref header,
                    ref request,
                } => self.send(index, disk, id, header, request),
                mirror::Effect::Done { op, result, released } => {
                    self.finished.push_back((
                        index,
                        op,
                        Finish::Done {
                            ok: result.is_ok(),
                            released,
                        },
                    ));
                }
                mirror::Effect::Release { op } => self.finished.push_back((index, op, Finish::Released)),
                mirror::Effect::ZeroFill { data, len } => {
                    // SAFETY: the payload is an operation's own or its guest's memory, kept until the operation is done,
                    // which it is not before its `Done`; no device is writing these bytes: they are holes.
                    let missing = unsafe { data.pieces(len as usize, |ptr, n| ptr.write_bytes(0, n)) };
                    assert_eq!(missing, 0, "a read's memory is as long as the read");
                }
                mirror::Effect::Merge { op, head, tail } => self.merges.push((op, head, tail)),
                mirror::Effect::Propose(proposal) => {
                    let volume = self.volumes[usize::from(index.0)]
                        .as_ref()
                        .expect("the volume that speaks")
                        .id;
                    self.tell(Event::Proposal(index, volume, proposal));
                }
                mirror::Effect::Attached { power_lost } => self.tell(Event::Attached {
                    volume: index,
                    power_lost,
                }),
                mirror::Effect::Abandon { disk } => self.abandon(index, disk),
                mirror::Effect::NewGeneration => self.tell(Event::NewGeneration(index)),
                mirror::Effect::Fenced => self.tell(Event::Fenced(index)),
                mirror::Effect::Failed => self.tell(Event::Failed(index)),
                // Seen by its phase, at the next tick.
                mirror::Effect::Detached => {}
            }
        }
        self.mirror_effects = effects;
        while let Some((name, head, tail)) = self.merges.pop() {
            let Some(volume) = &mut self.volumes[usize::from(index.0)] else {
                return;
            };
            let op = volume.names.op(name, false);
            let (head, tail) = self.merge(op, head, tail);
            self.with_mirror(index, |mirror, out| mirror.merged(name, head, tail, out));
        }
    }

    fn finish(&mut self, index: VolumeIndex, name: mirror::OpId, finish: Finish) {
        let Some(volume) = &mut self.volumes[usize::from(index.0)] else {
            return;
        };
        match finish {
            Finish::Done { ok, released } => {
                let op = volume.names.op(name, released);
                self.done(op, ok, released);
            }
            Finish::Released => {
                let holder = volume.names.op(name, true);
                self.released(index, holder);
            }
        }
    }

    /// A disk is silent for too long. One of this node is taken out of service, and its mirrors hear of it when its last I/O
    /// has ended; with one of another node this volume alone has no more to do, until it answers again.
    fn abandon(&mut self, index: VolumeIndex, disk: mirror::DiskIndex) {
        let volume = self.volumes[usize::from(index.0)]
            .as_ref()
            .expect("the volume that speaks");
        match volume.routes.get(usize::from(disk.0)).copied().flatten() {
            Some(Route::Near(disk)) => self.tell(Event::Silent(disk)),
            Some(Route::Far { link, disk, .. }) => self.abandon_far(index, link, disk),
            None => {}
        }
    }

    /// Tells the control threads. They may have gone, and then the reactor is about to be stopped.
    pub(super) fn tell(&self, event: Event) {
        self.events.send(event).ok();
    }

    /// A request was taken together with others: what the stores will look at for it is fetched while those before it
    /// are carried out.
    #[inline]
    pub(super) fn foresee(&self, index: VolumeIndex, request: &crate::frontend::Request) {
        use crate::frontend::{Kind, SECTOR};
        let Some(volume) = &self.volumes[usize::from(index.0)] else {
            return;
        };
        if volume.null || !matches!(request.kind, Kind::In | Kind::Out) {
            return;
        }
        let write = request.kind == Kind::Out;
        volume
            .mirror
            .foresee(request.sector * SECTOR, write, |disk, chunk, extent| {
                if let Some(Some(Route::Near(disk))) = volume.routes.get(usize::from(disk.0))
                    && let Home::Store(served) = &self.homes[usize::from(disk.0)]
                {
                    served.store.foresee(&chunk, extent);
                }
            });
    }

    fn send(
        &mut self,
        index: VolumeIndex,
        disk: mirror::DiskIndex,
        id: mirror::RequestId,
        header: &Header,
        request: &Request,
    ) {
        let tag = Address {
            shard: self.number,
            to: To::Volume {
                volume: index,
                request: id.0,
            },
        }
        .pack();
        let volume = self.volumes[usize::from(index.0)]
            .as_ref()
            .expect("the volume that sends");
        match volume.routes.get(usize::from(disk.0)).copied().flatten() {
            Some(Route::Near(disk)) => self.route(tag, disk, header, request),
            Some(Route::Far { link, disk, stay }) => {
                if !self.ask_far(tag, index, (link, disk, stay), *header, *request) {
                    self.reply(tag, Reply::Refused(Status::DiskFailed));
                }
            }
            None => self.reply(tag, Reply::Refused(Status::DiskFailed)),
        }
    }

    /// Brings a request to a disk of this node.
    pub(super) fn route(&mut self, tag: u64, disk: DiskIndex, header: &Header, request: &Request) {
        let home = usize::from(disk.0) % self.peers.len();
        if home == self.number {
            self.serve(tag, disk, header, request);
        } else {
            self.post(
                home,
                Message::Request {
                    tag,
                    disk,
                    header: *header,
                    request: *request,
                },
            );
        }
    }

    /// A request for a replica on this reactor.
    pub(super) fn serve(&mut self, tag: u64, disk: DiskIndex, header: &Header, request: &Request) {
        match &mut self.homes[usize::from(disk.0)] {
            Home::Store(served) => {
                served
                    .store
                    .take(Tag(tag), header, request, &mut self.store_effects);
                self.apply_store(disk);
                self.touch(disk);
            }
            Home::Null => {
                let up = self.disks[usize::from(disk.0)].expect("a disk that serves is up");
                self.reply(tag, null_reply(&up, request));
            }
            Home::Absent => self.reply(tag, Reply::Refused(Status::DiskFailed)),
        }
    }

    /// Does what a store wants done, in order.
    pub(super) fn apply_store(&mut self, disk: DiskIndex) {
        let mut effects = std::mem::take(&mut self.store_effects);
        for effect in effects.drain(..) {
            match effect {
                store::Effect::Io { token, io } => {
                    let Home::Store(served) = &mut self.homes[usize::from(disk.0)] else {
                        continue;
                    };
                    if !served.waiting.is_empty() {
                        served.waiting.push_back((token, io));
                        continue;
                    }
                    // SAFETY: the store's own pages and the operations' memory are kept until the I/O completed: the
                    // store answers a request only then, and `Op::carried` holds the memory until the answer.
                    match unsafe { served.disk.submit(&mut self.ring, token, io, &mut self.done) } {
                        Ok(()) => self
                            .completions
                            .extend(self.done.drain(..).map(|done| (disk, done))),
                        Err(Busy) => served.waiting.push_back((token, io)),
                    }
                }
                store::Effect::Reply {
                    tag: Address::NOBODY, ..
                } => {}
                store::Effect::Reply { tag, reply } => self.reply(tag.0, reply),
                store::Effect::Failed(reason) => {
                    if reason != store::Failure::Removed {
                        self.tell(Event::Distrusted(disk));
                    }
                    if let Home::Store(served) = &mut self.homes[usize::from(disk.0)] {
                        served.ending.get_or_insert_with(|| reason.to_string());
                    }
                }
                store::Effect::Closed => {
                    if let Home::Store(served) = &mut self.homes[usize::from(disk.0)] {
                        served.closed = true;
                    }
                }
            }
        }
        self.store_effects = effects;
    }

    /// Goes on with what devices had no room for, and lets go of disks that have ended.
    pub(super) fn poll_disks(&mut self) -> bool {
        let mut worked = false;
        for position in 0..self.stores.len() {
            let Some(&disk) = self.stores.get(position) else {
                break;
            };
            let Home::Store(served) = &mut self.homes[usize::from(disk.0)] else {
                continue;
            };
            if served.disk.in_hand() > 0 {
                worked |= served.disk.poll(&mut self.ring, &mut self.done);
            }
            while let Some(&(token, io)) = served.waiting.front() {
                // SAFETY: as in `apply_store`.
                if unsafe { served.disk.submit(&mut self.ring, token, io, &mut self.done) }.is_err() {
                    break;
                }
                worked = true;
                served.waiting.pop_front();
            }
            self.completions
                .extend(self.done.drain(..).map(|done| (disk, done)));
            let over = served.ending.is_some() || served.closed;
            if over && served.disk.in_hand() == 0 && served.waiting.is_empty() && served.store.idle() {
                worked = true;
                self.let_go(disk);
            }
        }
        worked
    }

    fn let_go(&mut self, disk: DiskIndex) {
        let home = std::mem::replace(&mut self.homes[usize::from(disk.0)], Home::Absent);
        let Home::Store(mut served) = home else { return };
        self.stores.retain(|&other| other != disk);
        served.disk.detach(&mut self.ring);
        // The device's lock goes with it, before anybody is told.
        drop(served.disk);
        drop(served.store);
        if let Some(reply) = served.closing {
            reply.send(served.closed).ok();
        }
        if let Some(reason) = served.ending {
            self.tell(Event::DiskFailed { disk, reason });
        }
    }

    #[inline]
    pub(super) fn reply(&mut self, tag: u64, reply: Reply) {
        let address = Address::unpack(tag);
        if address.shard == self.number {
            self.replies.push_back((address, reply));
        } else {
            self.post(address.shard, Message::Reply { tag, reply });
        }
    }

    fn answered(&mut self, address: Address, reply: Reply) {
        match address.to {
            To::Volume { volume, request } => {
                let id = mirror::RequestId(request);
                self.with_mirror(volume, |mirror, out| mirror.replied(id, reply, out));
            }
            To::Link { link, slot } => self.answer_far(link, slot, reply),
        }
    }

    fn post(&mut self, shard: usize, message: Message) {
        self.outboxes[shard].push_back(message);
    }

    /// Puts what is to go to other reactors into their mailboxes, as far as there is room.
    pub(super) fn send_outboxes(&mut self) {
        for (shard, outbox) in self.outboxes.iter_mut().enumerate() {
            if outbox.is_empty() {
                continue;
            }
            let peer = &self.peers[shard];
            while let Some(message) = outbox.pop_front() {
                if let Err(message) = peer.push(message) {
                    outbox.push_front(message);
                    break;
                }
            }
            if peer.waker().must_wake() {
                // SAFETY: the bell belongs to the mailbox, which lives as long as this reactor's sender to it.
                if unsafe { self.ring.notify(peer.waker().fd()) }.is_err() {
                    peer.waker().raise();
                }
            }
        }
    }
}

/// What a disk that keeps nothing answers.
fn null_reply(up: &crate::plane::DiskUp, request: &Request) -> Reply {
    match request {
        Request::Seal => Reply::Sealed(Box::new(Sealed {
            disk: up.uuid,
            boot: up.boot,
            power: up.power,
            suspect: false,
            chunks: Vec::new(),
        })),
        Request::Read { .. } => Reply::Read {
            holes: 0,
            bad: 0,
            lost: 0,
            crcs: [0; BLOCKS_PER_EXTENT],
        },
        Request::Digest { .. } => Reply::Digest {
            in_doubt: false,
            extents: Box::new([ExtentDigest::default(); EXTENTS_PER_REGION]),
        },
        _ => Reply::Done,
    }
}
