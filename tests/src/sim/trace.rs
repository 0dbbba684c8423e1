//! What goes into traces: requests, answers and device work in a line, and the weight of an answer in the hash that two
//! runs of a seed must share.

use unibody_dataplane::disk::Io;
use unibody_dataplane::replica::{Reply, Request};

/// An answer in a line of a trace.
pub(crate) fn brief(reply: &Reply) -> String {
    match reply {
        Reply::Digest { in_doubt, extents } => {
            let some: Vec<_> = extents
                .iter()
                .enumerate()
                .filter(|(_, e)| e.image.version.0 != 0)
                .map(|(i, e)| {
                    format!(
                        "{i}:{:x}/{:x}z{:x}b{:x}",
                        e.image.version.0, e.image.valid, e.image.zero, e.bad
                    )
                })
                .collect();
            format!("Digest doubt={in_doubt} {some:?}")
        }
        Reply::Read { holes, bad, lost, .. } => format!("Read holes={holes:x} bad={bad:x} lost={lost:x}"),
        other => format!("{other:?}"),
    }
}

/// An answer in the hash of a trace.
pub(crate) fn weight(reply: &Reply) -> u64 {
    match reply {
        Reply::Done => 1,
        Reply::Sealed(sealed) => sealed
            .chunks
            .iter()
            .fold(2, |all, chunk| all.rotate_left(1) ^ chunk.1),
        Reply::Read { holes, bad, crcs, .. } => {
            u64::from(*holes) << 48 ^ u64::from(*bad) << 32 ^ u64::from(crcs[0])
        }
        Reply::Digest { in_doubt, extents } => extents.iter().fold(u64::from(*in_doubt), |all, e| {
            all.rotate_left(7) ^ e.image.version.0 ^ u64::from(e.bad)
        }),
        Reply::Refused(status) => 1 << 40 | *status as u64,
    }
}

/// A request in a line of a trace.
pub(crate) fn brief_request(request: &Request) -> String {
    match request {
        Request::Write { span, version, .. } => {
            format!(
                "Write c{} e{} {}+{} v{:x}",
                span.chunk.key.chunk, span.extent, span.first, span.count, version.0
            )
        }
        Request::Zero { span, version } => {
            format!(
                "Zero c{} e{} {}+{} v{:x}",
                span.chunk.key.chunk, span.extent, span.first, span.count, version.0
            )
        }
        Request::Read { span, raw, .. } => {
            format!(
                "Read c{} e{} {}+{} raw={raw}",
                span.chunk.key.chunk, span.extent, span.first, span.count
            )
        }
        Request::Install {
            chunk,
            extent,
            image,
            write,
            ..
        } => format!(
            "Install c{} e{extent} v{:x} valid={:x} zero={:x} lost={:x} write={write:x}",
            chunk.key.chunk, image.version.0, image.valid, image.zero, image.lost
        ),
        other => format!("{other:?}"),
    }
}

/// What is asked of a device in a line of a trace.
pub(crate) fn brief_io(io: &Io) -> String {
    match io {
        Io::Read { offset, len, .. } => format!("read {offset:x}+{len:x}"),
        Io::Write { offset, len, .. } => format!("write {offset:x}+{len:x}"),
        other => format!("{other:?}"),
    }
}
