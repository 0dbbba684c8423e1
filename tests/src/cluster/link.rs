//! Links: from an owner's node to a replica's node, one connection after the other (`dataplane/src/wire` is the real one).
//!
//! The owner's end: requests in order, no more out than there are credits, no disk more than half of them; what is
//! unanswered when a connection ends is sent again, in order, by the next one, if the peer is the same process still and
//! tells of the same opening of the disk; otherwise the disk is down, with all that was asked of it.
//! The replica's end: a request waits until those of earlier connections to the same disk have ended; their answers go nowhere.

use std::collections::{BTreeMap, VecDeque};

use unibody_dataplane::ids::BLOCK;
use unibody_dataplane::memory::{Arena, Payload};
use unibody_dataplane::mirror::RequestId;
use unibody_dataplane::planted::{self, Bug};
use unibody_dataplane::replica::{Header, Reply, Request, Status};

use super::world::{Cluster, Event, Job};
use crate::sim::disk::{gather, scatter};
use crate::sim::trace::brief;
use crate::sim::world::{Checked, note};

/// On a connection.
#[derive(Debug)]
pub(super) enum Message {
    Request {
        place: u32,
        order: u64,
        drive: usize,
        turn: u64,
        header: Header,
        request: Request,
        memory: Option<Arena>,
    },
    Answer {
        place: u32,
        order: u64,
        reply: Reply,
        memory: Option<Arena>,
    },
    /// The connection stands: which process this is, and its disks that can be asked.
    Welcome { life: u64, drives: Vec<(usize, u64)> },
    /// A disk was opened, or is gone (`None`).
    Notice { drive: usize, turn: Option<u64> },
}

impl Message {
    /// From the replica's node to the owner's.
    pub(super) fn is_answer(&self) -> bool {
        !matches!(self, Message::Request { .. })
    }
}

#[derive(Debug)]
pub(super) struct Asked {
    pub(super) order: u64,
    pub(super) owner: u64,
    pub(super) id: RequestId,
    pub(super) drive: usize,
    pub(super) turn: u64,
    pub(super) header: Header,
    pub(super) request: Request,
    pub(super) sent: bool,
    pub(super) again: bool,
}

/// Both ends of a link.
#[derive(Debug, Default)]
pub(super) struct Link {
    pub(super) session: u64,
    pub(super) open: bool,
    /// The peer has told what it has.
    pub(super) ready: bool,
    pub(super) away_since: u64,
    /// The peer's process as last heard of.
    pub(super) peer: Option<u64>,
    /// Its disks that can be asked.
    pub(super) up: BTreeMap<usize, u64>,
    pub(super) asked: Vec<Option<Asked>>,
    pub(super) waiting: VecDeque<u32>,
    pub(super) last_there: u64,
    pub(super) last_back: u64,
    pub(super) stalled_there: VecDeque<(u64, Message)>,
    pub(super) stalled_back: VecDeque<(u64, Message)>,
    // The replica's end.
    pub(super) served: u64,
    pub(super) held: VecDeque<(Message, u64)>,
}

/// The blocks that travel with a request: how much memory it names, and which blocks of it.
fn travels(request: &Request) -> (Option<Payload>, usize, u16) {
    match request {
        Request::Write { span, data, .. } => (
            Some(*data),
            usize::from(span.count),
            ((1u32 << span.count) - 1) as u16,
        ),
        Request::Install { write, data, .. } => (Some(*data), 16, *write),
        Request::Read { span, data, .. } => (Some(*data), usize::from(span.count), 0),
        _ => (None, 0, 0),
    }
}

fn with_memory(request: Request, memory: Payload) -> Request {
    match request {
        Request::Write {
            span, version, crcs, ..
        } => Request::Write {
            span,
            version,
            crcs,
            data: memory,
        },
        Request::Read { span, raw, .. } => Request::Read {
            span,
            raw,
            data: memory,
        },
        Request::Install {
            chunk,
            extent,
            image,
            write,
            ..
        } => Request::Install {
            chunk,
            extent,
            image,
            write,
            data: memory,
        },
        other => other,
    }
}

impl Cluster {
    pub(super) fn link(&mut self, from: usize, to: usize) -> &mut Link {
        self.links
            .get_mut(&(from, to))
            .expect("every pair of nodes has its links")
    }

    /// An owner asks a disk of another node.
    pub(super) fn send_far(
        &mut self,
        owner: u64,
        (from, to): (usize, usize),
        drive: usize,
        id: RequestId,
        header: Header,
        request: Request,
    ) -> Checked {
        let order = self.fresh();
        let link = self.link(from, to);
        let Some(&turn) = link.up.get(&drive) else {
            return Err("a request to a disk that its link calls down".into());
        };
        let asked = Asked {
            order,
            owner,
            id,
            drive,
            turn,
            header,
            request,
            sent: false,
            again: false,
        };
        let place = link.asked.iter().position(Option::is_none).unwrap_or_else(|| {
            link.asked.push(None);
            link.asked.len() - 1
        });
        link.asked[place] = Some(asked);
        link.waiting.push_back(place as u32);
        self.gather(from, to);
        Ok(())
    }

    /// Sends what credits allow.
    pub(super) fn gather(&mut self, from: usize, to: usize) {
        let credits = self.profile.credits;
        let mut at = 0;
        let mut passed_over = Vec::new();
        loop {
            let link = self.link(from, to);
            if !link.ready || at >= link.waiting.len() {
                return;
            }
            let place = link.waiting[at];
            let Some(asked) = link.asked[place as usize].as_ref() else {
                link.waiting.remove(at);
                continue;
            };
            let drive = asked.drive;
            let out = |mine: bool| {
                let out = link
                    .asked
                    .iter()
                    .flatten()
                    .filter(|a| a.sent && (!mine || a.drive == drive));
                out.count()
            };
            if out(false) >= credits {
                self.count("waited for a credit");
                return;
            }
            if out(true) >= (credits / 2).max(1) || passed_over.contains(&drive) {
                passed_over.push(drive);
                at += 1;
                continue;
            }
            link.waiting.remove(at);
            let asked = link.asked[place as usize].as_mut().expect("it was there");
            let again = asked.again;
            asked.sent = true;
            let (order, turn, header, request) = (asked.order, asked.turn, asked.header, asked.request);
            let (data, pages, mask) = travels(&request);
            let memory = data.map(|data| {
                let mut memory = Arena::new(pages).expect("memory for a message");
                for block in (0..pages).filter(|block| mask >> block & 1 != 0) {
                    let bytes = gather(data.advance(block * BLOCK), BLOCK);
                    memory.bytes_mut(block, 1).copy_from_slice(&bytes);
                }
                memory
            });
            if again {
                self.count("sent again after a new connection");
            }
            note!(
                self,
                "far {from}>{to} disk {drive} place {place} {} again={again}",
                crate::sim::trace::brief_request(&request)
            );
            self.transmit(
                from,
                to,
                Message::Request {
                    place,
                    order,
                    drive,
                    turn,
                    header,
                    request,
                    memory,
                },
            );
        }
    }

    /// Puts a message on the present connection.
    pub(super) fn transmit(&mut self, from: usize, to: usize, message: Message) {
        let delay = self.delay(self.profile.message);
        let now = self.now;
        let link = self.link(from, to);
        let (session, last) = match message.is_answer() {
            false => (link.session, &mut link.last_there),
            true => (link.served, &mut link.last_back),
        };
        let time = (now + delay).max(*last + 1);
        *last = time;
        self.at(
            time,
            Event::Wire {
                from,
                to,
                session,
                message,
            },
        );
    }

    pub(super) fn wire(&mut self, from: usize, to: usize, session: u64, message: Message) -> Checked {
        let back = message.is_answer();
        let blocked = if back {
            self.blocked(to, from)
        } else {
            self.blocked(from, to)
        };
        let link = self.link(from, to);
        let stalled = if back {
            &mut link.stalled_back
        } else {
            &mut link.stalled_there
        };
        if blocked || !stalled.is_empty() {
            stalled.push_back((session, message));
            return Ok(());
        }
        self.arrived(from, to, session, message)
    }

    /// What waited for a partition to end goes on.
    pub(super) fn unstall(&mut self, from: usize, to: usize) -> Checked {
        for back in [false, true] {
            let blocked = if back {
                self.blocked(to, from)
            } else {
                self.blocked(from, to)
            };
            if blocked {
                continue;
            }
            let link = self.link(from, to);
            let stalled = std::mem::take(if back {
                &mut link.stalled_back
            } else {
                &mut link.stalled_there
            });
            for (session, message) in stalled {
                let node = if back { from } else { to };
                if self.sites[node].paused != 0 {
                    self.sites[node].backlog.push_back(Event::Wire {
                        from,
                        to,
                        session,
                        message,
                    });
                } else {
                    self.arrived(from, to, session, message)?;
                }
            }
        }
        Ok(())
    }

    fn arrived(&mut self, from: usize, to: usize, session: u64, message: Message) -> Checked {
        let link = self.link(from, to);
        if message.is_answer() {
            if link.session != session {
                return Ok(());
            }
            return match message {
                Message::Answer {
                    place,
                    order,
                    reply,
                    memory,
                } => self.far_answer(from, to, (place, order), reply, memory),
                Message::Welcome { life, drives } => self.welcome(from, to, life, drives),
                Message::Notice { drive, turn } => {
                    let mut now: Vec<(usize, u64)> =
                        self.link(from, to).up.iter().map(|(&d, &t)| (d, t)).collect();
                    now.retain(|&(d, _)| d != drive);
                    now.extend(turn.map(|turn| (drive, turn)));
                    self.offered(from, to, now)
                }
                Message::Request { .. } => Ok(()),
            };
        }
        if link.served != session || !self.sites[to].up {
            return Ok(());
        }
        self.serve(from, to, session, message)
    }

    /// The replica's end has a whole request.
    fn serve(&mut self, from: usize, to: usize, session: u64, message: Message) -> Checked {
        let Message::Request {
            place,
            order,
            drive,
            turn,
            header,
            request,
            memory,
        } = message
        else {
            return Ok(());
        };
        let there = &self.drives[drive];
        if there.turn != turn || there.store.is_none() {
            self.count("refused by another opening of the disk");
            let reply = Reply::Refused(Status::DiskFailed);
            return self.far_done((from, to), session, (place, order), drive, request, memory, reply);
        }
        let old = there.jobs.values().any(|job| {
            matches!(job, Job::Remote { from: f, to: t, session: s, .. } if (*f, *t) == (from, to) && *s != session)
        });
        if old && !planted::on(Bug::ResendBeforeDrain) {
            self.count("held until the old session was drained");
            let message = Message::Request {
                place,
                order,
                drive,
                turn,
                header,
                request,
                memory,
            };
            self.link(from, to).held.push_back((message, session));
            return Ok(());
        }
        let request = match &memory {
            Some(memory) => with_memory(request, memory.payload(0)),
            None => request,
        };
        let job = Job::Remote {
            from,
            to,
            session,
            place,
            order,
            request,
            memory,
        };
        self.ask_store(drive, header, request, job)
    }

    /// A disk has answered a request that came over a link.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn far_done(
        &mut self,
        (from, to): (usize, usize),
        session: u64,
        (place, order): (u32, u64),
        drive: usize,
        request: Request,
        memory: Option<Arena>,
        reply: Reply,
    ) -> Checked {
        let link = self.link(from, to);
        if link.served != session {
            self.count("answer of an old session");
            if planted::on(Bug::LateAnswer) {
                self.transmit(
                    from,
                    to,
                    Message::Answer {
                        place,
                        order,
                        reply,
                        memory,
                    },
                );
            }
            let held = std::mem::take(&mut self.link(from, to).held);
            for (message, session) in held {
                // Those that still have to wait are held again, in order.
                if self.link(from, to).served == session {
                    self.serve(from, to, session, message)?;
                }
            }
            return Ok(());
        }
        let _ = (drive, request);
        self.transmit(
            from,
            to,
            Message::Answer {
                place,
                order,
                reply,
                memory,
            },
        );
        Ok(())
    }

    fn far_answer(
        &mut self,
        from: usize,
        to: usize,
        (place, order): (u32, u64),
        reply: Reply,
        memory: Option<Arena>,
    ) -> Checked {
        let link = self.link(from, to);
        let asked = link
            .asked
            .get(place as usize)
            .and_then(Option::as_ref)
            .filter(|asked| asked.sent);
        let fits = asked.is_some_and(|asked| asked.order == order);
        let late = planted::on(Bug::LateAnswer) && asked.is_some();
        if !fits && !late {
            return Ok(());
        }
        let asked = link.asked[place as usize].take().expect("looked at");
        if let (Request::Read { span, raw, data }, Reply::Read { holes, bad, .. }, Some(memory)) =
            (&asked.request, &reply, &memory)
        {
            let mask = span.mask() & !holes & if *raw { !0 } else { !bad };
            for block in (0..usize::from(span.count))
                .filter(|block| mask >> (usize::from(span.first) + block) & 1 != 0)
            {
                if block < memory.pages() {
                    scatter(data.advance(block * BLOCK), memory.bytes(block, 1));
                }
            }
        }
        note!(self, "far answer {from}<{to} place {place} {}", brief(&reply));
        self.mark(&[4, self.now, from as u64, to as u64, u64::from(place), order]);
        self.gather(from, to);
        self.replied(asked.owner, asked.drive, asked.id, reply)
    }
}
