//! Threads that stay on one core.

use std::io;
use std::thread::JoinHandle;

/// Why a pinned thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The core does not exist or this process may not use it.
    #[error("core {core} is not among the cores this process may use ({allowed}); choose one of those")]
    Core {
        /// What was asked for.
        core: usize,
        /// What is allowed.
        allowed: String,
    },
    /// The system refused.
    #[error("starting the thread of core {core} failed")]
    System {
        /// The core.
        core: usize,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// The cores this process may run on, ascending.
pub fn allowed_cores() -> Vec<usize> {
    // SAFETY: `cpu_set_t` is a plain bit set, for which all zeros is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is writable and its size is passed.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) } != 0 {
        return Vec::new();
    }
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: the index is below the set's size.
        .filter(|&core| unsafe { libc::CPU_ISSET(core, &set) })
        .collect()
}

/// Runs `body` on a new thread called `name` that never leaves `core`.
///
/// # Errors
/// When the core is not ours to use or the thread can not be had.
pub fn spawn_pinned<T: Send + 'static>(
    name: &str,
    core: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<Pinned<T>, PinError> {
    let allowed = allowed_cores();
    if !allowed.contains(&core) {
        let allowed = allowed
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        return Err(PinError::Core { core, allowed });
    }
    let (send, receive) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let pinned = pin_current(core);
            let failed = pinned.is_err();
            // A failure to send means that the starter is gone, and then there is nobody to work for.
            if send.send(pinned).is_err() || failed {
                return None;
            }
            Some(body())
        })
        .map_err(|source| PinError::System { core, source })?;
    match receive.recv() {
        Ok(Ok(())) => Ok(Pinned(thread)),
        Ok(Err(source)) => Err(PinError::System { core, source }),
        Err(_) => Err(PinError::System {
            core,
            source: io::ErrorKind::BrokenPipe.into(),
        }),
    }
}

/// A thread that stays on its core.
#[derive(Debug)]
pub struct Pinned<T>(JoinHandle<Option<T>>);

impl<T> Pinned<T> {
    /// Waits for its end. `Err` is its panic.
    ///
    /// # Errors
    /// When the thread panicked.
    pub fn join(self) -> std::thread::Result<T> {
        self.0
            .join()
            .map(|result| result.expect("a thread that was pinned ran its body"))
    }

    /// It has ended.
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

/// Keeps the calling thread on `core`.
///
/// # Errors
/// When the system refuses the core.
pub fn pin_current(core: usize) -> io::Result<()> {
    if core >= libc::CPU_SETSIZE as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: as in `allowed_cores`.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the index was checked above.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: the set is readable and its size is passed; 0 is the calling thread.
    match unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_where_it_was_told() {
        let core = *allowed_cores().last().unwrap();
        let ran_on = spawn_pinned("pinned", core, allowed_cores)
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(ran_on, [core]);
    }

    #[test]
    fn refuses_a_core_that_is_not_there() {
        let error = spawn_pinned("pinned", 1000, || ()).unwrap_err();
        assert!(error.to_string().contains("core 1000"), "{error}");
    }
}
