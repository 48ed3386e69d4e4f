//! Which process holds a listening port, as far as `/proc` tells: for one error message, never for a decision.

use std::{fs, path::Path};

/// The holder of a listening TCP port, such as `python3 (pid 812)`.
pub fn of_port(port: u16) -> Option<String> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .find_map(|table| listening_inode(&table, port))?;
    let pid = process_with(&format!("socket:[{inode}]"))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(format!("{} (pid {pid})", name.trim()))
}

/// Inode of the socket that listens on `port`, in a table as the kernel prints it (proc_net_tcp.txt of the kernel's documentation).
fn listening_inode(table: &str, port: u16) -> Option<u64> {
    const LISTEN: &str = "0A";
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (_, hex_port) = fields.get(1)?.rsplit_once(':')?;
        let matches = u16::from_str_radix(hex_port, 16) == Ok(port) && fields.get(3) == Some(&LISTEN);
        matches.then(|| fields.get(9)?.parse().ok()).flatten()
    })
}

fn process_with(link: &str) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?;
    processes.filter_map(Result::ok).find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        holds(&entry.path().join("fd"), link).then_some(pid)
    })
}

fn holds(descriptors: &Path, link: &str) -> bool {
    let Ok(entries) = fs::read_dir(descriptors) else { return false };
    entries.filter_map(Result::ok).any(|e| fs::read_link(e.path()).is_ok_and(|to| to.as_os_str() == link))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_listening_socket_of_the_port_counts() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:4965 0100007F:9999 01 00000000:00000000 00:00000000 00000000  0  0 11 1 x 20\n\
            1: 0100007F:4965 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 22 1 x 100\n";
        assert_eq!(listening_inode(table, 0x4965), Some(22));
        assert_eq!(listening_inode(table, 1), None);
        assert_eq!(listening_inode("", 1), None);
    }
}
