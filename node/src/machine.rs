//! What this machine gives to this process: memory that can be had without swapping, and cores.
//!
//! In a container the machine's own figures say too much, so the limits of the control groups count where they are smaller. Cores are
//! left to the standard library, which knows affinity and CPU quotas of both versions of control groups.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Taken where the machine says nothing, in bytes.
const UNKNOWN_MEMORY: u64 = 8 << 30;

/// Memory that can be had now, and who says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) bytes: u64,
    /// What bounds it, for people.
    pub(crate) bound: &'static str,
}

impl Memory {
    /// What this process could take now without swapping.
    pub(crate) fn available() -> Self {
        Self::read(&|path| fs::read_to_string(path).ok())
    }

    fn read(file: &Read<'_>) -> Self {
        let free = file(Path::new("/proc/meminfo")).and_then(|text| mem_available(&text));
        let machine = match free {
            Some(bytes) => Self { bytes, bound: "the machine's free memory" },
            None => Self { bytes: UNKNOWN_MEMORY, bound: "a guess, since the machine does not say" },
        };
        let groups = file(Path::new("/proc/self/cgroup")).map(|text| group_folders(&text)).unwrap_or_default();
        let least = groups.iter().filter_map(|group| group.available(file)).min();
        match least {
            Some(bytes) if bytes < machine.bytes => Self { bytes, bound: "the control group's memory limit" },
            _ => machine,
        }
    }
}

/// Cores that this process may use at once.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Reads a file; passed in, so that tests bring their own machine.
type Read<'a> = dyn Fn(&Path) -> Option<String> + 'a;

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib << 10)
}

/// Folder of one control group, and which version's files stand in it.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    folder: PathBuf,
    is_v2: bool,
}

/// The control groups that bound this process's memory: its own and all above it, whose limits hold too.
fn group_folders(proc_self_cgroup: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in proc_self_cgroup.lines() {
        // id:controllers:path, with id 0 and no controllers for version 2
        let mut parts = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let is_v2 = id == "0" && controllers.is_empty();
        let root = match is_v2 {
            true => Path::new("/sys/fs/cgroup"),
            false if controllers.split(',').any(|name| name == "memory") => Path::new("/sys/fs/cgroup/memory"),
            false => continue,
        };
        let relative = Path::new(path.trim_start_matches('/'));
        groups.extend(relative.ancestors().map(|part| Group { folder: root.join(part), is_v2 }));
    }
    groups
}

impl Group {
    /// What is left below its limit; file pages that nobody uses now count as free. None without a limit.
    fn available(&self, file: &Read<'_>) -> Option<u64> {
        let (limit, used, idle) = match self.is_v2 {
            true => ("memory.max", "memory.current", "inactive_file"),
            false => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        };
        let number = |name: &str| file(&self.folder.join(name))?.trim().parse::<u64>().ok();
        // "max", or version 1's number beyond any memory, is no limit
        let limit = number(limit).filter(|bytes| *bytes < 1 << 60)?;
        let stat = file(&self.folder.join("memory.stat")).unwrap_or_default();
        let idle = stat.lines().find_map(|line| line.strip_prefix(idle)?.trim().parse::<u64>().ok()).unwrap_or(0);
        let used = number(used).unwrap_or(0).saturating_sub(idle);
        Some(limit.saturating_sub(used))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const MEMINFO: &str = "MemTotal:       8000000 kB\nMemAvailable:    4194304 kB\n";

    fn machine(files: &[(&str, &str)]) -> Memory {
        let files: HashMap<PathBuf, String> =
            files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect();
        Memory::read(&|path| files.get(path).cloned())
    }

    #[test]
    fn without_limits_the_machine_says_what_is_free() {
        let found = machine(&[("/proc/meminfo", MEMINFO), ("/proc/self/cgroup", "0::/a\n")]);
        assert_eq!(found, Memory { bytes: 4 << 30, bound: "the machine's free memory" });
        assert_eq!(machine(&[]).bytes, UNKNOWN_MEMORY);
    }

    #[test]
    fn a_smaller_limit_of_a_group_or_of_one_above_it_counts() {
        let v2 = machine(&[
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/cgroup", "0::/pod/container\n"),
            ("/sys/fs/cgroup/pod/container/memory.max", "max\n"),
            ("/sys/fs/cgroup/pod/memory.max", "1073741824\n"),
            ("/sys/fs/cgroup/pod/memory.current", "536870912\n"),
            ("/sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 268435456\n"),
        ]);
        assert_eq!(v2, Memory { bytes: (1 << 30) - (256 << 20), bound: "the control group's memory limit" });
        let v1 = machine(&[
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/cgroup", "4:memory:/docker/x\n1:cpu:/\n0::/\n"),
            // the path is the host's, and only the root of the mount can be seen from within
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "2147483648\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "1073741824\n"),
            ("/sys/fs/cgroup/memory/memory.stat", "total_inactive_file 0\n"),
        ]);
        assert_eq!(v1.bytes, 1 << 30);
    }

    #[test]
    fn a_limit_beyond_any_memory_is_none() {
        let found = machine(&[
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/cgroup", "4:memory:/\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        assert_eq!(found.bytes, 4 << 30);
    }
}
