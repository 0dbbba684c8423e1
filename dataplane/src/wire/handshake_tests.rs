//! Both ends against each other, in memory and over sockets, and against somebody in the middle.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const SERVES: &[(Purpose, Params)] = &[(Purpose::Control, [1; PARAMS]), (Purpose::Data, [2; PARAMS])];

fn local(node: u64, secret: &str) -> Local {
    Local {
        node: NodeId(node),
        incarnation: Incarnation(u128::from(node) << 64 | 5),
        token: Token::new(secret.as_bytes()),
        nonce: [node as u8; 32],
    }
}

fn dialer() -> Handshake {
    Handshake::dial(local(1, "secret"), Purpose::Data, [9; PARAMS], Some(NodeId(2)))
}

fn listener() -> Handshake {
    Handshake::listen(local(2, "secret"), SERVES)
}

type Ends = (Result<Peer, HandshakeError>, Result<Peer, HandshakeError>);

/// Carries bytes between the two until both are over or nothing moves; `meddle` sees each message (number, bytes).
fn carry(mut a: Handshake, mut b: Handshake, mut meddle: impl FnMut(usize, &mut Vec<u8>)) -> Ends {
    let mut queues = [Vec::new(), Vec::new()];
    let mut errors = [None, None];
    let mut number = 0;
    loop {
        let mut moved = false;
        for (i, end) in [&mut a, &mut b].into_iter().enumerate() {
            let mut said = end.output();
            if !said.is_empty() {
                meddle(number, &mut said);
                number += 1;
                queues[1 - i].extend(said);
                moved = true;
            }
            while end.wants() > 0 && !queues[i].is_empty() {
                // In two pieces where that is possible.
                let now = end.wants().div_ceil(2).min(queues[i].len());
                let bytes: Vec<u8> = queues[i].drain(..now).collect();
                moved = true;
                if let Err(error) = end.input(&bytes) {
                    errors[i] = Some(error);
                }
            }
        }
        if !moved {
            break;
        }
    }
    let [first, second] = errors;
    let over = |end: Handshake, error: Option<HandshakeError>| match (end.finish(), error) {
        (Some(peer), None) => Ok(peer),
        (None, Some(error)) => Err(error),
        (None, None) => Err(HandshakeError::TimedOut),
        (Some(_), Some(error)) => panic!("a failed handshake gives no peer: {error}"),
    };
    (over(a, first), over(b, second))
}

fn plain(a: Handshake, b: Handshake) -> Ends {
    carry(a, b, |_, _| ())
}

#[test]
fn both_ends_learn_who_the_other_is_and_share_a_key() {
    let (a, b) = plain(dialer(), listener());
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!((a.node, b.node), (NodeId(2), NodeId(1)));
    assert_eq!(a.incarnation, Incarnation(2 << 64 | 5));
    assert_eq!(b.incarnation, Incarnation(1 << 64 | 5));
    assert_eq!((a.params, b.params), ([2; PARAMS], [9; PARAMS]));
    assert_eq!((a.purpose, b.purpose), (Purpose::Data, Purpose::Data));
    assert_eq!((a.version, b.version), (1, 1));
    assert_eq!(a.key, b.key);
    assert_ne!(a.key.0, [0; 32]);
    // Another nonce, another key.
    let mut other = local(1, "secret");
    other.nonce[31] ^= 1;
    let again = Handshake::dial(other, Purpose::Data, [9; PARAMS], None);
    assert_ne!(plain(again, listener()).0.unwrap().key, a.key);
}

#[test]
fn a_wrong_token_is_told_apart_at_both_ends() {
    let stranger = Handshake::dial(local(1, "guess"), Purpose::Data, [0; PARAMS], None);
    let (a, b) = plain(stranger, listener());
    assert!(matches!(a, Err(HandshakeError::WrongToken)));
    assert!(matches!(b, Err(HandshakeError::Refused(Refusal::Token))));
    let counts = Counts::default();
    counts.count(&a);
    counts.count(&b);
    counts.count(&Ok(()));
    assert_eq!(
        counts.now(),
        CountsNow {
            wrong_token: 2,
            accepted: 1,
            ..CountsNow::default()
        }
    );
}

#[test]
fn a_dialer_that_does_not_know_the_token_is_refused() {
    // It ignores that the listener's proof is wrong, and makes something up.
    let mut b = listener();
    let mut a = Handshake::dial(local(1, "guess"), Purpose::Data, [0; PARAMS], None);
    let hello = a.output();
    b.input(&hello[..HEAD]).unwrap();
    b.input(&hello[HEAD..]).unwrap();
    let answer = b.output();
    let mut forged = head(PROVE, Purpose::Data as u8, 0, 0).to_vec();
    // The listener's own proof, sent back.
    forged.extend_from_slice(&answer[HEAD + IDENTITY..]);
    b.input(&forged[..HEAD]).unwrap();
    assert!(matches!(
        b.input(&forged[HEAD..]),
        Err(HandshakeError::WrongToken)
    ));
    assert_eq!(b.wants(), 0);
    assert_eq!(b.output()[9], Refusal::Token as u8);
    assert!(b.finish().is_none());
}

#[test]
fn a_message_sent_back_to_its_sender_proves_nothing() {
    // A dialer whose hello comes back to it.
    let mut a = dialer();
    let hello = a.output();
    assert!(matches!(
        a.input(&hello[..HEAD]),
        Err(HandshakeError::Malformed("unexpected message"))
    ));
    // Somebody who knows no token plays two listeners off against each other: the answer of one is no proof for the other.
    let (mut b, mut c) = (listener(), Handshake::listen(local(3, "secret"), SERVES));
    for end in [&mut b, &mut c] {
        end.input(&hello[..HEAD]).unwrap();
        end.input(&hello[HEAD..]).unwrap();
    }
    let answer = b.output();
    let mut proof = head(PROVE, Purpose::Data as u8, 0, 0).to_vec();
    proof.extend_from_slice(&answer[HEAD + IDENTITY..]);
    c.input(&proof[..HEAD]).unwrap();
    assert!(matches!(c.input(&proof[HEAD..]), Err(HandshakeError::WrongToken)));
}

#[test]
fn a_proof_of_another_connection_is_worth_nothing() {
    let mut recorded = Vec::new();
    let (a, b) = carry(dialer(), listener(), |_, bytes| recorded.push(bytes.clone()));
    assert!(a.is_ok() && b.is_ok());
    // The same hello and proof again, to a listener with a fresh nonce.
    let mut fresh = local(2, "secret");
    fresh.nonce = [77; 32];
    let mut b = Handshake::listen(fresh, SERVES);
    b.input(&recorded[0][..HEAD]).unwrap();
    b.input(&recorded[0][HEAD..]).unwrap();
    b.input(&recorded[2][..HEAD]).unwrap();
    assert!(matches!(
        b.input(&recorded[2][HEAD..]),
        Err(HandshakeError::WrongToken)
    ));
}

#[test]
fn the_wrong_node_purpose_or_oneself_is_told_apart() {
    let other = Handshake::dial(local(1, "secret"), Purpose::Data, [0; PARAMS], Some(NodeId(7)));
    let (a, b) = plain(other, listener());
    assert!(matches!(
        a,
        Err(HandshakeError::WrongNode {
            wanted: NodeId(7),
            found: NodeId(2)
        })
    ));
    assert!(matches!(b, Err(HandshakeError::Refused(Refusal::Node))));

    let only_control = Handshake::listen(local(2, "secret"), &SERVES[..1]);
    let (a, b) = plain(dialer(), only_control);
    assert!(matches!(a, Err(HandshakeError::Refused(Refusal::Purpose))));
    assert!(matches!(b, Err(HandshakeError::WrongPurpose { code: 2 })));

    let mirror = Handshake::listen(local(1, "secret"), SERVES);
    let (a, b) = plain(dialer(), mirror);
    assert!(matches!(a, Err(HandshakeError::Refused(Refusal::Itself))));
    assert!(matches!(b, Err(HandshakeError::Itself)));
}

#[test]
fn other_versions_are_refused_by_name() {
    let (a, b) = carry(dialer(), listener(), |number, bytes| {
        if number == 0 {
            bytes[10..14].copy_from_slice(&[4, 0, 6, 0]);
        }
    });
    assert!(matches!(b, Err(HandshakeError::WrongVersion { min: 4, max: 6 })));
    assert!(matches!(
        a,
        Err(HandshakeError::WrongVersion {
            min: VERSION_MIN,
            max: VERSION_MAX
        })
    ));
    // Somebody in the middle who only lowers the range is found out by the proof.
    let (a, b) = carry(dialer(), listener(), |number, bytes| {
        if number == 0 {
            bytes[12] = 9;
        }
    });
    assert!(matches!(a, Err(HandshakeError::WrongToken)) && b.is_err());
}

#[test]
fn a_busy_listener_says_so() {
    let mut b = listener();
    b.refuse_busy();
    let (a, _) = plain(dialer(), b);
    assert!(matches!(a, Err(HandshakeError::Refused(Refusal::Busy))));
}

#[test]
fn the_bytes_are_those_of_the_format() {
    let mut recorded = Vec::new();
    let (a, _) = carry(dialer(), listener(), |_, bytes| recorded.push(bytes.clone()));
    let hash = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_string();
    let sizes: Vec<usize> = recorded.iter().map(Vec::len).collect();
    assert_eq!(sizes, [112, 144, 48]);
    assert_eq!(&recorded[0][..16], b"UniBodyW\x01\x02\x01\0\x01\0\0\0");
    let hashes: Vec<String> = recorded.iter().map(|bytes| hash(bytes)).collect();
    assert_eq!(hashes, GOLDEN);
    assert_eq!(hash(&a.unwrap().key.0), GOLDEN_KEY);
}

const GOLDEN: [&str; 3] = ["086d91df4d028dff", "dffa1c7c23704151", "aee9d85b4793d313"];
const GOLDEN_KEY: &str = "7e03188aab77e294";

proptest! {
    /// Any change of any byte on the way, or a message cut short, and no end that saw it takes the other for proven.
    #[test]
    fn nothing_can_be_changed_on_the_way(number in 0usize..3, at in any::<prop::sample::Index>(), flip in 1u8.., cut in any::<bool>()) {
        let (a, b) = carry(dialer(), listener(), |now, bytes| {
            if now == number {
                let at = at.index(bytes.len());
                if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
            }
        });
        prop_assert!(b.is_err());
        // The dialer is done when it has sent its proof.
        prop_assert!(a.is_err() || number == 2);
    }

    /// Any bytes at all are refused without more ado.
    #[test]
    fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..400), magic in any::<bool>(), listens in any::<bool>()) {
        let mut end = if listens { listener() } else { dialer() };
        end.output();
        let mut bytes = bytes;
        if magic {
            bytes.splice(..0, MAGIC);
        }
        let mut at = 0;
        while end.wants() > 0 && at < bytes.len() {
            let now = end.wants().min(bytes.len() - at);
            prop_assert!(end.wants() <= MESSAGE_MAX);
            if end.input(&bytes[at..at + now]).is_err() {
                break;
            }
            at += now;
        }
        prop_assert!(end.finish().is_none());
    }
}

#[test]
fn over_sockets_bytes_after_the_handshake_are_left_alone() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap();
    let far = std::thread::spawn(move || {
        let mut socket = TcpStream::connect(address).unwrap();
        let peer = run(&mut socket, dialer(), Duration::from_secs(10)).unwrap();
        socket.write_all(b"first words").unwrap();
        peer
    });
    let (mut socket, _) = port.accept().unwrap();
    let peer = run(&mut socket, listener(), Duration::from_secs(10)).unwrap();
    assert_eq!(peer.key, far.join().unwrap().key);
    let mut words = [0; 11];
    socket.read_exact(&mut words).unwrap();
    assert_eq!(&words, b"first words");
}

#[test]
fn over_sockets_silence_ends_and_a_refusal_arrives() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut silent = TcpStream::connect(port.local_addr().unwrap()).unwrap();
    let (mut socket, _) = port.accept().unwrap();
    let outcome = run(&mut socket, listener(), Duration::from_millis(30));
    assert!(matches!(outcome, Err(HandshakeError::TimedOut)), "{outcome:?}");
    drop(socket);
    assert_eq!(silent.read(&mut [0; 9]).unwrap(), 0);

    // The listener refuses after the head, with the dialer's body still unread.
    let address = port.local_addr().unwrap();
    let far = std::thread::spawn(move || {
        let mut socket = TcpStream::connect(address).unwrap();
        run(&mut socket, dialer(), Duration::from_secs(10))
    });
    let (mut socket, _) = port.accept().unwrap();
    let only_control = Handshake::listen(local(2, "secret"), &SERVES[..1]);
    let outcome = run(&mut socket, only_control, Duration::from_secs(10));
    assert!(matches!(outcome, Err(HandshakeError::WrongPurpose { code: 2 })));
    drop(socket);
    let told = far.join().unwrap();
    assert!(
        matches!(told, Err(HandshakeError::Refused(Refusal::Purpose))),
        "{told:?}"
    );
}
