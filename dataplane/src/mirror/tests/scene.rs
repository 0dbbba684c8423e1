//! A volume of one chunk on two disks, and a driver that carries out what its mirror asks for.

use super::super::*;
use crate::config::{Change, Slot, SlotState};
use crate::geometry::Geometry;
use crate::ids::{BLOCK, BootId, CHUNK, ChunkKey, Generation, LayerId, PowerId, VolumeId};
use crate::memory::Arena;
use crate::replica::{ChunkRef, Sealed, Status};

const BOOT: BootId = BootId(5);

/// A volume of one chunk on two disks, attached, with nothing written.
pub(super) struct Scene {
    pub(super) mirror: Mirror,
    pub(super) config: VolumeConfig,
    pub(super) out: Vec<Effect>,
    /// Disks that answer nothing.
    pub(super) silent: Vec<DiskIndex>,
    /// Disks that do not answer writes, or flushes.
    pub(super) writes_lost: Vec<DiskIndex>,
    pub(super) flushes_lost: Vec<DiskIndex>,
    /// Disks with a bad block.
    pub(super) rotten: Vec<DiskIndex>,
    /// The control state takes its time.
    pub(super) undecided: bool,
    pub(super) proposed: Vec<Proposal>,
    /// Flushes each disk was asked for.
    pub(super) flushes: [u32; 3],
    /// Disks that obey a later owner.
    pub(super) sealed_by_another: Vec<DiskIndex>,
    pub(super) done: Vec<(OpId, Result<(), OpError>, bool)>,
    /// What each disk was last told to be stable.
    pub(super) heard: [Version; 3],
    /// The generation that each disk obeys, and the newest version it was given.
    pub(super) obeys: [Generation; 3],
    pub(super) newest: [Version; 3],
    /// No new generation is to be had.
    pub(super) no_majority: bool,
    /// The second disk's copy of the first block rotted, which only a digest that looks can tell.
    pub(super) rotted: bool,
    /// Writes whenever a seal is out.
    pub(super) guest: Option<Arena>,
    /// How often each disk has lost its power, and was opened anew with it kept.
    pub(super) power_losses: [u128; 3],
    pub(super) openings: [u128; 3],
    /// Writes that were not answered, and digests of the first region that were asked for.
    pub(super) stuck: Vec<RequestId>,
    pub(super) digests: u32,
    /// Disks that found something of theirs gone.
    pub(super) suspect: Vec<DiskIndex>,
}

impl Scene {
    pub(super) fn new() -> Self {
        Self::with(Limits::default())
    }

    pub(super) fn with(limits: Limits) -> Self {
        let slot = |n| Slot {
            disk: DiskUuid(n),
            state: SlotState::InSync,
            incarnation: 1,
            boot: BootId::default(),
            power: PowerId::default(),
        };
        let config = VolumeConfig {
            id: VolumeId(1),
            head: LayerId(1),
            size: CHUNK,
            geometry: Geometry::new(256 << 10, 1).unwrap(),
            generation: Generation(1),
            config: 1,
            chunks: vec![vec![slot(1), slot(2)]],
        };
        let mut scene = Scene {
            mirror: Mirror::new(config.clone(), limits),
            config,
            out: Vec::new(),
            silent: Vec::new(),
            writes_lost: Vec::new(),
            flushes_lost: Vec::new(),
            rotten: Vec::new(),
            undecided: false,
            proposed: Vec::new(),
            flushes: [0; 3],
            sealed_by_another: Vec::new(),
            done: Vec::new(),
            heard: [Version::ZERO; 3],
            obeys: [Generation(0); 3],
            newest: [Version::ZERO; 3],
            no_majority: false,
            rotted: false,
            guest: None,
            power_losses: [0; 3],
            openings: [0; 3],
            stuck: Vec::new(),
            digests: 0,
            suspect: Vec::new(),
        };
        for disk in [1, 2] {
            scene.mirror.disk_up(DiskUuid(disk), true, &mut scene.out);
        }
        scene.mirror.attach(&mut scene.out);
        scene.play();
        scene
    }

    /// Carries out the effects: disks that are not silent answer at once, proposals are committed.
    pub(super) fn play(&mut self) {
        while !self.out.is_empty() {
            // Seals are answered last: nothing may follow one before its answer.
            let mut seals = Vec::new();
            for effect in std::mem::take(&mut self.out) {
                match effect {
                    Effect::Send {
                        disk,
                        id,
                        header,
                        request,
                    } if !self.silent.contains(&disk) => {
                        let d = usize::from(disk.0);
                        self.flushes[d] += u32::from(request == Request::Flush);
                        let lost = match request {
                            Request::Write { .. } => &self.writes_lost,
                            Request::Flush => &self.flushes_lost,
                            _ => &Vec::new(),
                        };
                        self.digests += u32::from(matches!(request, Request::Digest { region: 0, .. }));
                        if lost.contains(&disk) {
                            self.stuck.push(id);
                            continue;
                        }
                        if request == Request::Seal {
                            seals.push((d, header.generation, id));
                        } else {
                            assert_eq!(header.generation, self.obeys[d], "a store would refuse that");
                            self.heard[d] = header.stable;
                        }
                        if let Request::Write { version, .. } = request {
                            assert!(version > self.newest[d], "versions grow");
                            self.newest[d] = version;
                        }
                        self.rotted &= !(d == 1 && matches!(request, Request::Install { .. }));
                        let reply = match request {
                            Request::Seal => continue,
                            Request::Digest { .. } => Reply::Digest {
                                in_doubt: false,
                                extents: Box::new(self.digests(d, &request)),
                            },
                            Request::Read { .. } => Reply::Read {
                                holes: u16::from(
                                    self.newest[d] == Version::ZERO && !self.rotten.contains(&disk),
                                ),
                                bad: u16::from(self.rotten.contains(&disk)),
                                lost: 0,
                                crcs: [0; 16],
                            },
                            Request::Confirm if self.sealed_by_another.contains(&disk) => {
                                Reply::Refused(Status::StaleGeneration)
                            }
                            _ => Reply::Done,
                        };
                        self.mirror.replied(id, reply, &mut self.out);
                    }
                    Effect::Propose(proposal) if self.undecided => self.proposed.push(proposal),
                    Effect::Propose(proposal) => {
                        self.commit(&proposal.change);
                        let outcome = Outcome::Committed(self.config.clone());
                        self.mirror.decided(outcome, &mut self.out);
                    }
                    Effect::Done { op, result, released } => self.done.push((op, result, released)),
                    Effect::NewGeneration if !self.no_majority => {
                        self.config.generation.0 += 1;
                        self.config.config += 1;
                        self.mirror.renewed(self.config.clone(), &mut self.out);
                    }
                    _ => {}
                }
            }
            if let Some(arena) = self.guest.take_if(|_| !seals.is_empty()) {
                self.submit(20, OpKind::Write, &arena);
                self.guest = Some(arena);
                let sealing = |to: DiskIndex| seals.iter().any(|(d, ..)| *d == usize::from(to.0));
                let early = |effect: &Effect| matches!(effect, Effect::Send { disk, .. } if sealing(*disk));
                assert!(
                    !self.out.iter().any(early),
                    "sent to a disk that has not obeyed yet"
                );
            }
            for (d, generation, id) in seals {
                self.obeys[d] = generation;
                let sealed = Sealed {
                    disk: self.mirror.disk(DiskIndex(d as u16)),
                    boot: BootId(BOOT.0 + self.power_losses[d] + self.openings[d]),
                    power: PowerId(6 + self.power_losses[d]),
                    suspect: self.suspect.contains(&DiskIndex(d as u16)),
                    chunks: self.held_by(self.mirror.disk(DiskIndex(d as u16))),
                };
                self.mirror
                    .replied(id, Reply::Sealed(Box::new(sealed)), &mut self.out);
            }
        }
    }

    /// The replicas that a disk has: those that were written once.
    pub(super) fn held_by(&self, disk: DiskUuid) -> Vec<(ChunkRef, u64)> {
        let held = self.config.chunks[0]
            .iter()
            .filter(|slot| slot.disk == disk && slot.boot != BootId::default());
        held.map(|slot| {
            let key = ChunkKey {
                volume: VolumeId(1),
                layer: LayerId(1),
                chunk: 0,
            };
            let incarnation = slot.incarnation;
            (ChunkRef { key, incarnation }, 0)
        })
        .collect()
    }

    /// What was asked of the control state is committed, or is not.
    pub(super) fn decide(&mut self, commit: bool) {
        self.undecided = false;
        for proposal in std::mem::take(&mut self.proposed) {
            let outcome = if commit {
                self.commit(&proposal.change);
                Outcome::Committed(self.config.clone())
            } else {
                Outcome::Moved(self.config.clone())
            };
            self.mirror.decided(outcome, &mut self.out);
        }
        self.play();
    }

    pub(super) fn disk_goes(&mut self, disk: u128) {
        self.mirror.disk_down(DiskUuid(disk), &mut self.out);
        self.play();
    }

    pub(super) fn disk_comes(&mut self, disk: u128) {
        self.mirror.disk_up(DiskUuid(disk), true, &mut self.out);
        self.play();
    }

    pub(super) fn flush(&mut self, op: u32) {
        let out = &mut self.out;
        self.mirror
            .submit(OpId(op), OpKind::Flush, 0, 0, Payload::NONE, &[], out);
        self.play();
    }

    /// A volume with a write behind it, everything flushed, at two seconds.
    pub(super) fn settled(arena: &Arena) -> Self {
        let mut scene = Scene::new();
        scene.submit(0, OpKind::Write, arena);
        scene.pass(0, 2_000);
        assert_eq!(std::mem::take(&mut scene.done), [(OpId(0), Ok(()), true)]);
        assert_eq!(scene.mirror.status().stable, Version::new(Generation(1), 1));
        scene
    }

    pub(super) fn commit(&mut self, change: &Change) {
        self.config.config += 1;
        for slot in &mut self.config.chunks[0] {
            match *change {
                Change::MarkStale { disk, .. } if disk == slot.disk => slot.state = SlotState::Stale,
                Change::MarkInSync {
                    disk, boot, power, ..
                } if disk == slot.disk => {
                    (slot.boot, slot.power) = (boot, power);
                }
                _ => {}
            }
        }
    }

    /// The guest reads or writes the first block.
    pub(super) fn submit(&mut self, op: u32, kind: OpKind, arena: &Arena) {
        let crcs: &[u32] = if kind == OpKind::Write { &[0] } else { &[] };
        self.mirror.submit(
            OpId(op),
            kind,
            0,
            BLOCK as u64,
            arena.payload(0),
            crcs,
            &mut self.out,
        );
    }

    /// Lets time pass in the steps in which a driver would tell it.
    pub(super) fn pass(&mut self, from: u64, to: u64) {
        for now in (from..=to).step_by(100) {
            self.mirror.tick(now, &mut self.out);
            self.play();
        }
    }
}
