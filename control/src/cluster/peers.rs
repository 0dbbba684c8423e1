//! Where the other nodes are, and the connections of this node's reactors to their disks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::ToSocketAddrs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use unibody_dataplane::wire::handshake::{self, Local};

use super::{Ground, door};
use crate::state::{NodeId, State};

/// Time for one attempt to connect to a node.
const DIAL: Duration = Duration::from_secs(2);
/// First pause between two attempts; each later one is twice as long, up to the last.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Addresses by node. Shared with the threads that dial them.
type Book = Arc<Mutex<BTreeMap<NodeId, Vec<String>>>>;

/// See the module.
pub(crate) struct Peers {
    book: Book,
    me: Local,
}

impl Peers {
    pub(crate) fn new(me: Local) -> Self {
        Peers {
            book: Book::default(),
            me,
        }
    }

    /// Makes the data plane know the nodes that the state knows.
    pub(crate) fn look(&mut self, ground: &Ground, state: &State) {
        let others: BTreeMap<NodeId, Vec<String>> = state
            .nodes
            .iter()
            .filter(|(node, _)| **node != ground.me)
            .map(|(node, record)| (*node, record.addresses.clone()))
            .collect();
        let known: BTreeSet<NodeId> = {
            let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
            if *book == others {
                return;
            }
            let known = book.keys().copied().collect();
            book.clone_from(&others);
            known
        };
        for node in others.keys().filter(|node| !known.contains(node)) {
            if let Err(error) = ground.plane.add_node(handshake::NodeId(node.0)) {
                eprintln!("unibody: the disks of node {node} can not be reached: {error}");
            }
        }
        for node in known.iter().filter(|node| !others.contains_key(node)) {
            ground.plane.forget_node(handshake::NodeId(node.0));
        }
    }

    /// Connects to a node for a reactor, as often as needed while the node is known.
    pub(crate) fn dial(&self, ground: &Ground, node: NodeId, reactor: u16) {
        let (plane, me, book) = (Arc::clone(&ground.plane), self.me.clone(), Arc::clone(&self.book));
        let dialing = std::thread::Builder::new().name("dial".into()).spawn(move || {
            let mut pause = PAUSE;
            loop {
                let addresses = book
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get(&node)
                    .cloned();
                let Some(addresses) = addresses else { return };
                let resolved = addresses
                    .iter()
                    .filter_map(|address| address.to_socket_addrs().ok());
                for address in resolved.flatten() {
                    let peer = handshake::NodeId(node.0);
                    if plane.dial(door::local(&me), peer, reactor, address, DIAL).is_ok() {
                        return;
                    }
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSE_MAX);
            }
        });
        if let Err(error) = dialing {
            eprintln!("unibody: a thread can not be started: {error}");
        }
    }
}
