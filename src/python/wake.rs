//! A file descriptor that becomes readable when it is told to: an eventfd on Linux, a pipe elsewhere.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// One end is watched, the other written to; an eventfd is both.
pub(super) struct Wake {
    watched: OwnedFd,
    written: Option<OwnedFd>,
}

// === impl Wake ===

impl Wake {
    #[cfg(target_os = "linux")]
    pub(super) fn new() -> io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Self { watched: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?, written: None })
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn new() -> io::Result<Self> {
        let (watched, written) = rustix::pipe::pipe()?;
        for end in [&watched, &written] {
            rustix::io::fcntl_setfd(end, rustix::io::FdFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(end, true)?;
        }
        Ok(Self { watched, written: Some(written) })
    }

    /// What the event loop watches.
    pub(super) fn fd(&self) -> RawFd {
        self.watched.as_raw_fd()
    }

    /// Makes it readable.
    pub(super) fn signal(&self) {
        let end: BorrowedFd<'_> = self.written.as_ref().unwrap_or(&self.watched).as_fd();
        // Full means readable, which is what was wanted.
        let _ = rustix::io::write(end, &1_u64.to_ne_bytes());
    }

    /// Makes it unreadable again. Signals come one at a time, so that one read takes all of them.
    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&self.watched, &mut [0_u8; 64]);
    }
}
