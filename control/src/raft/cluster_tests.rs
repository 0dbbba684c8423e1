//! Whole clusters in one process, over TCP on the loopback interface: leaders lost, networks cut, stores lost.
//!
//! Nothing here depends on how long something takes: conditions are waited for, with limits that only a hang reaches.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use unibody_dataplane::ids::DiskUuid;
use unibody_dataplane::wire::handshake::Token;

use super::Gate;
use super::cluster::{Cluster, ClusterError, Options, ProposeError, Start, Timing};
use super::lease::LEASE;
use super::store::StoreError;
use crate::state::{Applied, Command, NodeId, Refused, State};

const LIMIT: Duration = Duration::from_secs(60);

const TIMING: Timing = Timing {
    heartbeat: Duration::from_millis(100),
    election: (Duration::from_millis(500), Duration::from_millis(1000)),
    dead_after: Duration::from_secs(3),
    propose: Duration::from_secs(40),
    snapshot_every: 50,
    keep_entries: 10,
};

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Which messages do not get through, as (from, to).
#[derive(Clone, Default)]
struct Cuts(Arc<Mutex<BTreeSet<(NodeId, NodeId)>>>);

impl Cuts {
    fn gate(&self) -> Gate {
        let cuts = self.clone();
        Arc::new(move |from, to| !cuts.0.lock().unwrap().contains(&(from, to)))
    }

    fn cut(&self, from: NodeId, to: NodeId) {
        self.0.lock().unwrap().insert((from, to));
    }

    fn heal(&self) {
        self.0.lock().unwrap().clear();
    }
}

struct Member {
    dir: TempDir,
    options: Options,
    cluster: Option<Cluster>,
}

impl Member {
    fn new(name: &str, cuts: &Cuts, timing: Timing) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            dir: dir.path().join("state"),
            name: name.into(),
            addresses: Vec::new(),
            domain: format!("rack-{name}"),
            memory: 1 << 30,
            token: Token::new(b"a secret of this cluster"),
            incarnation: 0,
            timing,
            gate: Some(cuts.gate()),
        };
        Member {
            dir,
            options,
            cluster: None,
        }
    }

    /// Runs the node, as a new process would: another incarnation. Where it was before, if it was anywhere.
    fn start(&mut self, start: &Start) {
        let begin = Instant::now();
        let address = self
            .options
            .addresses
            .first()
            .map_or("127.0.0.1:0", String::as_str);
        let listener = loop {
            match TcpListener::bind(address) {
                // What was dropped still listens.
                Err(_) if begin.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(20)),
                bound => break bound.unwrap(),
            }
        };
        self.options.addresses = vec![listener.local_addr().unwrap().to_string()];
        self.options.incarnation = super::random();
        let cluster = loop {
            match Cluster::start(self.options.clone(), start) {
                // What was dropped has not let go of the file yet.
                Err(ClusterError::Store(StoreError::InUse(_))) if begin.elapsed() < LIMIT => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                started => break started.unwrap(),
            }
        };
        cluster.listen(listener).unwrap();
        self.cluster = Some(cluster);
    }

    fn up(&self) -> &Cluster {
        self.cluster.as_ref().expect("it runs")
    }

    fn id(&self) -> NodeId {
        self.up().identity().node
    }

    fn state(&self) -> Arc<State> {
        self.up().view().state.clone()
    }
}

/// A cluster of some nodes; all are members when this returns.
fn cluster(count: usize, cuts: &Cuts) -> Vec<Member> {
    let mut members = Vec::new();
    for number in 0..count {
        let mut member = Member::new(&format!("n{number}"), cuts, TIMING);
        let start = match members.last() {
            None => Start::Init,
            // By way of one that need not lead.
            Some(door) => Start::Join(vec!["127.0.0.1:1".into(), address(door)]),
        };
        member.start(&start);
        member.up().wait_member(LIMIT).unwrap();
        members.push(member);
    }
    let wanted = [0, 1, 1, 3, 3, 5, 5][count];
    wait_until("all voters", || {
        members.iter().all(|member| {
            let status = member.up().status();
            status.voters.len() == wanted
                && status.learners.len() == count - wanted
                && status.leader.is_some()
                && !status.changing
        })
    });
    members
}

fn address(member: &Member) -> String {
    member.options.addresses[0].clone()
}

/// When a test fails, how each member stood.
struct Says<'a>(&'a [Member]);

impl Drop for Says<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let running = self.0.iter().filter_map(|member| member.cluster.as_ref());
            running.for_each(|cluster| eprintln!("{:?}", cluster.status()));
        }
    }
}

fn leader(members: &[Member]) -> usize {
    let _said = Says(members);
    let mut found = None;
    wait_until("a leader that a majority follows", || {
        let running = || {
            members
                .iter()
                .enumerate()
                .filter(|(_, member)| member.cluster.is_some())
        };
        found = running()
            .find(|(_, member)| {
                let led = running().filter(|(_, other)| {
                    let status = other.up().status();
                    status.leader == Some(member.id()) && status.term == member.up().status().term
                });
                member.up().is_leader() && led.count() * 2 > members.len()
            })
            .map(|(index, _)| index);
        found.is_some()
    });
    found.unwrap()
}

fn add_disk(member: &Member, number: u128) -> Command {
    Command::AddDisk {
        disk: DiskUuid(number),
        node: member.id(),
        domain: String::new(),
        bytes: 1 << 30,
    }
}

fn propose(member: &Member, command: &Command) -> Applied {
    member.up().propose(member.up().request(), command).unwrap()
}

/// All running members come to have the same state, and it passes its own check.
fn agree(members: &[Member]) {
    let _said = Says(members);
    let running = || members.iter().filter(|member| member.cluster.is_some());
    let index = running().map(|member| member.up().status().last).max().unwrap();
    wait_until("all have applied everything", || {
        running().all(|member| member.up().view().applied >= index)
    });
    wait_until("all agree", || {
        let states: Vec<_> = running().map(|member| member.up().view()).collect();
        states
            .windows(2)
            .all(|pair| pair[0].applied != pair[1].applied || pair[0].state == pair[1].state)
            && states.windows(2).all(|pair| pair[0].applied == pair[1].applied)
    });
    running().for_each(|member| assert_eq!(member.state().check(), Ok(())));
}

fn volume(name: &str, disks: &[u128]) -> Command {
    Command::CreateVolume {
        name: name.into(),
        size: 1 << 20,
        mirror: disks.len() as u32,
        stripe_unit: 1 << 18,
        stripe_width: 1,
        read_only: false,
        instance: 1,
        chunks: vec![disks.iter().map(|&disk| DiskUuid(disk)).collect()],
    }
}

#[test]
fn every_node_can_propose_and_all_agree_after_the_leader_was_lost() {
    let cuts = Cuts::default();
    let mut members = cluster(3, &cuts);
    for (number, member) in (1..).zip(&members) {
        assert_eq!(propose(member, &add_disk(member, number)), Applied::Done);
        assert!(
            member.state().usable(DiskUuid(number)).is_some(),
            "who proposed sees the effect"
        );
    }
    let refused = members[1]
        .up()
        .propose(members[1].up().request(), &volume("v", &[1, 9]));
    assert!(matches!(
        refused,
        Err(ProposeError::Refused(Refused::Placement { chunk: 0, .. }))
    ));
    agree(&members);
    let lost = leader(&members);
    members[lost].cluster = None;
    let other = (lost + 1) % 3;
    propose(&members[other], &volume("v", &[1, 2]));
    // Somewhere else, where nobody looks for it.
    members[lost].options.addresses.clear();
    members[lost].start(&Start::Resume(vec![]));
    let _said = Says(&members);
    wait_until("the new process is known", || {
        let (id, incarnation) = (members[lost].id(), members[lost].options.incarnation);
        members
            .iter()
            .all(|member| member.state().nodes[&id].incarnation == incarnation)
    });
    agree(&members);
    assert!(members[lost].state().volumes.contains_key("v"));
    let confirmed = members[other].up().confirmed().unwrap();
    assert!(confirmed.state.volumes.contains_key("v"));
}

#[test]
fn a_leader_that_is_cut_off_commits_nothing_and_follows_later() {
    let cuts = Cuts::default();
    let members = cluster(3, &cuts);
    let old = leader(&members);
    let others: Vec<usize> = (0..3).filter(|index| *index != old).collect();
    for &other in &others {
        cuts.cut(members[old].id(), members[other].id());
        cuts.cut(members[other].id(), members[old].id());
    }
    let request = members[old].up().request();
    let command = add_disk(&members[old], 50);
    std::thread::scope(|scope| {
        // It hangs until the network is whole again; then it is made, once.
        let pending = scope.spawn(|| members[old].up().propose(request, &command));
        let there = &members[others[0]];
        let made = there.up().propose(there.up().request(), &add_disk(there, 51));
        let all: Vec<_> = members.iter().map(|member| member.up().status()).collect();
        assert_eq!(made, Ok(Applied::Done), "{all:#?}");
        assert!(members[old].state().usable(DiskUuid(50)).is_none());
        assert!(members[old].state().usable(DiskUuid(51)).is_none());
        cuts.heal();
        assert_eq!(pending.join().unwrap(), Ok(Applied::Done));
    });
    agree(&members);
    assert_eq!(members[0].state().disks.len(), 2);
}

#[test]
fn a_lost_reply_does_not_make_a_change_twice() {
    let cuts = Cuts::default();
    let members = cluster(3, &cuts);
    for (number, member) in (1..).zip(&members) {
        propose(member, &add_disk(member, number));
    }
    propose(&members[0], &volume("v", &[1, 2]));
    agree(&members);
    let leads = leader(&members);
    let (leading, asking) = (&members[leads], &members[(leads + 1) % 3]);
    let attach = Command::Attach {
        name: "v".into(),
        node: asking.id(),
        generation: 0,
    };
    let request = asking.up().request();
    cuts.cut(leading.id(), asking.id());
    std::thread::scope(|scope| {
        let pending = scope.spawn(|| asking.up().propose(request, &attach));
        wait_until("it was made, or somebody else leads", || {
            members
                .iter()
                .any(|member| member.state().volumes["v"].generation == 1)
                || !leading.up().is_leader()
        });
        cuts.heal();
        let answer = pending.join().unwrap().unwrap();
        let Applied::Volume(config) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(config.generation.0, 1);
    });
    // And again, from elsewhere, long after.
    let again = leading.up().propose(request, &attach).unwrap();
    assert!(matches!(again, Applied::Volume(config) if config.generation.0 == 1));
    // A request of its own is refused: the state has moved on.
    let other = leading.up().propose(leading.up().request(), &attach);
    assert_eq!(
        other,
        Err(ProposeError::Refused(Refused::Overtaken { name: "v".into() }))
    );
    agree(&members);
}

#[test]
fn snapshots_bring_back_restarted_nodes_and_bring_up_new_ones() {
    let cuts = Cuts::default();
    let mut members = cluster(3, &cuts);
    for number in 0..120 {
        let member = &members[number as usize % 3];
        propose(member, &add_disk(member, number % 40 + 1));
    }
    wait_until("snapshots", || {
        members.iter().all(|member| member.up().status().snapshot >= 90)
    });
    agree(&members);
    let before = members[0].state();
    // All at once, as after a power loss.
    members.iter_mut().for_each(|member| member.cluster = None);
    members
        .iter_mut()
        .for_each(|member| member.start(&Start::Resume(vec![])));
    let disks = |member: &Member| member.state().disks.clone();
    for member in &members {
        assert!(
            !disks(member).is_empty(),
            "a restarted node knows the state before it hears from anybody"
        );
    }
    leader(&members);
    wait_until("everything is back", || {
        members.iter().all(|member| disks(member) == before.disks)
    });
    let mut late = Member::new("late", &cuts, TIMING);
    late.start(&Start::Join(members[2].options.addresses.clone()));
    late.up().wait_member(LIMIT).unwrap();
    members.push(late);
    agree(&members);
    assert!(
        members[3].up().status().snapshot >= 90,
        "it came by a snapshot: the first entries are gone"
    );
    assert_eq!(disks(&members[3]), before.disks);
}

#[test]
fn a_learner_takes_the_place_of_a_dead_voter_and_a_lost_store_is_a_new_node() {
    let cuts = Cuts::default();
    let mut members = cluster(4, &cuts);
    let status = members[0].up().status();
    let learner = *status.learners.first().unwrap();
    let leads = leader(&members);
    let lost = (0..4)
        .find(|&index| index != leads && status.voters.contains(&members[index].id()))
        .unwrap();
    let lost_id = members[lost].id();
    members[lost].cluster = None;
    let witness = (0..4).find(|&index| index != lost && index != leads).unwrap();
    wait_until("the learner votes", || {
        let voters = members[witness].up().status().voters;
        voters.contains(&learner) && !voters.contains(&lost_id) && voters.len() == 3
    });
    // The same machine with an empty disk is another node; its name is still taken.
    let mut empty = Member::new(&members[lost].options.name, &cuts, TIMING);
    empty.start(&Start::Join(members[witness].options.addresses.clone()));
    let refused = empty.up().wait_member(LIMIT);
    assert!(
        matches!(&refused, Err(ClusterError::Refused(Refused::NodeExists(_)))),
        "{refused:?}"
    );
    drop(empty);
    propose(&members[witness], &Command::RemoveNode { node: lost_id });
    // Started as one that goes on, which finds nothing to go on with.
    let mut empty = Member::new(&members[lost].options.name, &cuts, TIMING);
    empty.start(&Start::Resume(members[witness].options.addresses.clone()));
    empty.up().wait_member(LIMIT).unwrap();
    assert_ne!(empty.id(), lost_id);
    wait_until("the old one has left", || {
        let status = empty.up().status();
        !status.learners.contains(&lost_id) && status.voters.len() + status.learners.len() == 4
    });
    // The removed node, back with its old store, stays out.
    members[lost].start(&Start::Resume(vec![]));
    members.push(empty);
    propose(&members[witness], &add_disk(&members[witness], 1));
    assert!(!members[witness].state().nodes.contains_key(&lost_id));
    let out = members.remove(lost);
    assert_ne!(out.up().status().leader, Some(lost_id));
    agree(&members);
}

/// With one voter dead, the other two are a majority only together.
#[test]
fn a_voter_that_is_removed_votes_until_the_others_can_do_without_it() {
    let cuts = Cuts::default();
    let mut members = cluster(3, &cuts);
    let leads = leader(&members);
    let (dead, removed) = ((leads + 1) % 3, (leads + 2) % 3);
    members[dead].cluster = None;
    // Until nobody takes the dead one for there.
    std::thread::sleep(TIMING.dead_after);
    let removed_id = members[removed].id();
    propose(&members[leads], &Command::RemoveNode { node: removed_id });
    wait_until("it knows that it is to go", || {
        !members[removed].state().nodes.contains_key(&removed_id)
    });
    // Two rounds of the task that would end it.
    std::thread::sleep(2 * TIMING.heartbeat + Duration::from_secs(1));
    assert!(!members[removed].up().is_removed());
    propose(&members[leads], &add_disk(&members[leads], 1));
    members[dead].start(&Start::Resume(vec![]));
    wait_until("it can go", || members[removed].up().is_removed());
    members[removed].cluster = None;
    propose(&members[dead], &add_disk(&members[dead], 2));
    agree(&members);
}

/// What a process that has ended said of its node comes after what its successor said.
#[test]
fn a_late_word_of_an_earlier_process_does_not_stay() {
    let cuts = Cuts::default();
    let members = cluster(3, &cuts);
    let Options {
        addresses,
        memory,
        incarnation,
        ..
    } = members[1].options.clone();
    let late = Command::NodeUp {
        node: members[1].id(),
        addresses,
        memory,
        incarnation: incarnation ^ 1,
    };
    propose(&members[2], &late);
    wait_until("it is said again", || {
        let state = members[2].state();
        state.nodes[&members[1].id()].incarnation == incarnation
    });
    members[1].up().renew_lease().unwrap();
}

#[test]
fn five_voters_bear_the_loss_of_two() {
    let cuts = Cuts::default();
    let mut members = cluster(5, &cuts);
    propose(&members[4], &add_disk(&members[4], 1));
    for _ in 0..2 {
        let lost = leader(&members);
        members[lost].cluster = None;
    }
    let left = members.iter().find(|member| member.cluster.is_some()).unwrap();
    propose(left, &add_disk(left, 2));
    assert_eq!(left.state().disks.len(), 2);
    for member in members.iter_mut().filter(|member| member.cluster.is_none()) {
        member.start(&Start::Resume(vec![]));
    }
    agree(&members);
    assert_eq!(members[0].state().disks.len(), 2);
}

#[test]
fn a_founder_that_was_removed_does_not_come_back_by_itself() {
    let cuts = Cuts::default();
    let mut members = cluster(3, &cuts);
    let founder = members[0].id();
    propose(&members[1], &Command::RemoveNode { node: founder });
    wait_until("it has heard that it was removed", || {
        members[0].up().is_removed() && !members[0].state().nodes.contains_key(&founder)
    });
    members[0].cluster = None;
    members[0].start(&Start::Resume(vec![]));
    let waited = members[0].up().wait_member(LIMIT);
    assert!(matches!(waited, Err(ClusterError::Removed)), "{waited:?}");
    assert!(
        !members[1]
            .up()
            .confirmed()
            .unwrap()
            .state
            .nodes
            .contains_key(&founder)
    );
}

#[test]
fn nobody_without_the_token_gets_anything() {
    let cuts = Cuts::default();
    let members = cluster(1, &cuts);
    let door = members[0].options.addresses[0].clone();
    let mut stranger = Member::new("stranger", &cuts, TIMING);
    stranger.options.token = Token::new(b"a guess");
    stranger.start(&Start::Join(vec![door.clone()]));
    wait_until("the stranger was turned away", || {
        members[0].up().status().handshakes.wrong_token > 0
            || stranger.up().status().handshakes.wrong_token > 0
            || members[0].up().status().handshakes.broken > 0
    });
    // A call in the clear, where a handshake belongs.
    let mut raw = TcpStream::connect(&door).unwrap();
    let call = br#"{"propose":{"format":2,"request":{"request":{"id":"00000000000000000000000000000001","since":0},"term":null,"command":{"drain":{"node":1,"on":true}}}}}"#;
    raw.write_all(&(call.len() as u32).to_le_bytes()).unwrap();
    raw.write_all(call).unwrap();
    raw.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = Vec::new();
    // An end or a reset: nothing but a refusal came before it.
    let _ = raw.read_to_end(&mut answer);
    assert!(answer.len() <= 16, "{answer:?}");
    wait_until("it was counted", || {
        members[0].up().status().handshakes.malformed > 0
    });
    assert!(matches!(
        stranger.up().wait_member(Duration::from_millis(1)),
        Err(ClusterError::NotYet(_))
    ));
    assert_eq!(members[0].state().nodes.len(), 1);
    assert_eq!(members[0].up().view().members.len(), 1);
}

#[test]
fn what_belongs_to_a_node_is_taken_only_when_its_lease_is_over() {
    let cuts = Cuts::default();
    let members = cluster(3, &cuts);
    for (number, member) in (1..).zip(&members) {
        propose(member, &add_disk(member, number));
    }
    propose(&members[0], &volume("v", &[1, 2]));
    agree(&members);
    let leads = leader(&members);
    let (leading, owner) = (&members[leads], &members[(leads + 1) % 3]);
    let attach = Command::Attach {
        name: "v".into(),
        node: owner.id(),
        generation: 0,
    };
    propose(owner, &attach);
    let asked = Instant::now();
    let lease = owner.up().renew_lease().unwrap();
    assert!(lease.until >= asked + LEASE && lease.until <= Instant::now() + LEASE);
    let revoke = Command::Revoke {
        name: "v".into(),
        generation: 1,
    };
    // However late we are: either the lease is over, or nothing is taken.
    let mut early = 0;
    wait_until("the lease is over", || {
        match leading.up().take_from(owner.id(), &revoke) {
            Err(ProposeError::Leased(_)) => {
                early += 1;
                false
            }
            Ok(_) => {
                assert!(Instant::now() > lease.until, "taken under a lease");
                true
            }
            other => panic!("{other:?}"),
        }
    });
    assert!(early > 0, "it was never asked in time");
    assert_eq!(leading.state().volumes["v"].owner, None);
    assert_eq!(
        owner.up().take_from(leading.id(), &revoke),
        Err(ProposeError::NotLeader)
    );
    // It may have leases again, and knows what was taken by then.
    owner.up().renew_lease().unwrap();
    assert_eq!(owner.state().volumes["v"].owner, None);
}

#[test]
fn a_store_that_is_not_ours_is_refused() {
    let cuts = Cuts::default();
    let mut member = Member::new("n", &cuts, TIMING);
    let dir = member.options.dir.clone();
    let start = |member: &Member, start: &Start| Cluster::start(member.options.clone(), start).err();
    let missing = start(&member, &Start::Resume(vec![]));
    assert!(matches!(
        missing,
        Some(ClusterError::Store(StoreError::Missing(_)))
    ));
    member.start(&Start::Init);
    member.up().wait_member(LIMIT).unwrap();
    let in_use = start(&member, &Start::Resume(vec![]));
    assert!(matches!(in_use, Some(ClusterError::Store(StoreError::InUse(_)))));
    member.cluster.take().unwrap().stop();
    let mut exists = start(&member, &Start::Init);
    wait_until("the file is free", || {
        exists = start(&member, &Start::Init);
        !matches!(exists, Some(ClusterError::Store(StoreError::InUse(_))))
    });
    assert!(matches!(exists, Some(ClusterError::Store(StoreError::Exists(_)))));
    std::fs::write(
        dir.join("cluster.redb"),
        b"something else, for which there was a reason",
    )
    .unwrap();
    let foreign = start(&member, &Start::Resume(vec![]));
    assert!(
        matches!(foreign, Some(ClusterError::Store(StoreError::Database { .. }))),
        "{foreign:?}"
    );
    assert_eq!(
        std::fs::read(dir.join("cluster.redb")).unwrap(),
        b"something else, for which there was a reason"
    );
    assert!(member.dir.path().exists());
}
