//! Ending with whoever started this process: its standard input is a pipe the parent holds, and the kernel closes it when
//! the parent ends, however it ends.

use std::{
    io::{self, Read as _},
    process, thread,
};

/// Ends this process at once when standard input does.
pub(crate) fn exit_with_stdin() -> io::Result<()> {
    let watch = || {
        let (mut stdin, mut bytes) = (io::stdin().lock(), [0; 256]);
        // What is written there says nothing.
        while matches!(stdin.read(&mut bytes), Ok(1..)) {}
        process::exit(0);
    };
    // A thread, so that nothing the rest of the process does can delay it.
    thread::Builder::new().name("parent".to_owned()).spawn(watch).map(drop)
}
