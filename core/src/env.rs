//! Every environment variable that Tangelo reads or sets, in one documented list.
//!
//! Reading them is the caller's business (this room does no IO); this is where their names live.

/// What an environment variable is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnvVar {
    /// Its name.
    pub name: &'static str,
    /// Who sets it.
    pub set_by: &'static str,
    /// What it means.
    pub meaning: &'static str,
}

macro_rules! env_vars {
    ($($ident:ident = $name:literal, $set_by:literal, $meaning:literal;)*) => {
        $(#[doc = $meaning] pub const $ident: &str = $name;)*
        /// Every variable, for documentation and tests.
        pub const ALL: &[EnvVar] = &[$(EnvVar { name: $name, set_by: $set_by, meaning: $meaning }),*];
    };
}

env_vars! {
    RANK = "RANK", "tangelo run, torchrun", "Global rank of this process.";
    LOCAL_RANK = "LOCAL_RANK", "tangelo run, torchrun", "Rank of this process on its node; chooses the device.";
    WORLD_SIZE = "WORLD_SIZE", "tangelo run, torchrun", "Number of ranks in the job.";
    LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE", "tangelo run, torchrun", "Number of ranks on this node.";
    GROUP_RANK = "GROUP_RANK", "tangelo run, torchrun", "Index of this node.";
    GROUP_WORLD_SIZE = "GROUP_WORLD_SIZE", "tangelo run, torchrun", "Number of nodes.";
    MASTER_ADDR = "MASTER_ADDR", "tangelo run, torchrun", "Host where the ranks meet.";
    MASTER_PORT = "MASTER_PORT", "tangelo run, torchrun", "Port where the ranks meet.";
    AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE", "tangelo run, torchrun", "True where the launcher already serves the store at MASTER_ADDR:MASTER_PORT, so rank 0 does not.";
    RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT", "tangelo run, torchrun", "How often the job was restarted so far.";
    MAX_RESTARTS = "TORCHELASTIC_MAX_RESTARTS", "tangelo run, torchrun", "How often it may be restarted.";
    RUN_ID = "TORCHELASTIC_RUN_ID", "tangelo run, torchrun", "Name of the run, part of every store key.";
    SLURM_PROCID = "SLURM_PROCID", "Slurm", "Global rank where srun started the ranks.";
    SLURM_LOCALID = "SLURM_LOCALID", "Slurm", "Local rank where srun started the ranks.";
    SLURM_NTASKS = "SLURM_NTASKS", "Slurm", "World size where srun started the ranks.";
    SLURM_STEP_ID = "SLURM_STEP_ID", "Slurm", "Number of the job step; only processes that srun started have one.";
    SLURM_JOB_ID = "SLURM_JOB_ID", "Slurm", "Number of the job; decides MASTER_PORT where srun started the ranks and it is not set.";
    SLURM_NODEID = "SLURM_NODEID", "Slurm", "Index of this node where srun started the ranks.";
    SLURM_NNODES = "SLURM_NNODES", "Slurm", "Number of nodes where srun started the ranks.";
    SLURM_TASKS_PER_NODE = "SLURM_TASKS_PER_NODE", "Slurm", "Ranks on each node where srun started them, such as 2(x3),1.";
    SLURM_NODELIST = "SLURM_STEP_NODELIST", "Slurm", "Nodes of the step; the first is MASTER_ADDR where that is not set.";
    CUDA_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES", "user", "GPUs to use; `--nproc-per-node auto` starts one rank for each, and a device of `auto` is the CPU where it names none.";
    ERROR_FILE = "TANGELO_ERROR_FILE", "tangelo run", "File into which a rank writes its last error as JSON before it exits.";
    PROGRESS_FD = "TANGELO_PROGRESS_FD", "tangelo run, eval, export", "File descriptor on which rank 0 or a verb writes progress as JSON lines, for the launcher's bar.";
    SUPERVISOR_PID = "TANGELO_SUPERVISOR_PID", "tangelo run, eval, export", "Process id of the launcher: a worker that finds another parent exits.";
    POSITION_FILE = "TANGELO_POSITION_FILE", "tangelo run", "File into which a rank writes, before and after each of its collectives, where it is: read by the launcher when ranks hang.";
    FAULT = "TANGELO_FAULT", "tests", "A planted fault, `kind@step[:rank][/phase]`: kill, stop, error, panic, hang at the start of the step or of a phase in it (`tangelo_core::Phase`, such as ring); nan, kill_in_save in the step.";
    DRIVER_ADDRESS = "TANGELO_DRIVER_ADDRESS", "tangelo run, the driver", "host:port of the driver, with which node agents and workers of an RL job register.";
    HOST = "TANGELO_HOST", "user, tangelo run", "Name or address of this node by which the other nodes of the job reach it; agents and workers bind a free port on it. 127.0.0.1 where it is not set.";
    JOB_SECRET_FILE = "TANGELO_JOB_SECRET_FILE", "tangelo run, the driver", "File, readable by its owner alone, with the secret that every call between processes of the job carries.";
    JOB_SECRET = "TANGELO_JOB_SECRET", "user", "The secret itself, at least 32 characters, where no file can be shared between nodes.";
    COUNT_ALLOCATIONS = "TANGELO_COUNT_ALLOCATIONS", "user", "Not empty: on a CPU, count the tensors that forward and backward allocate (metric pass_allocation_bytes).";
    CPU_KERNELS = "TANGELO_CPU_KERNELS", "user", "generic, avx2 or avx512: kernels for a lesser CPU than this one; anything else is the best it has.";
    TEST_BINARIES = "TANGELO_TEST_BINARIES", "cargo xtask test", "Folder of the `tangelo` and `tangelo-worker` that tests start; they build them where it is not set.";
    TEST_FAULTS = "TANGELO_TEST_FAULTS", "user", "`all`: the tests of failures plant every fault in every phase of their layouts, not a choice of them.";
    TEST_SEED = "TANGELO_TEST_SEED", "user", "Repeats a test that draws fresh random cases, with the seed it printed.";
    LIBTORCH = "LIBTORCH", "user, set-up", "Folder of a libtorch to use instead of the one that set-up installs.";
    NO_COLOR = "NO_COLOR", "user", "Set to anything: no colours on the terminal.";
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_unique_and_documented() {
        let mut names: Vec<_> = super::ALL.iter().map(|v| v.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), super::ALL.len());
        assert!(super::ALL.iter().all(|v| !v.meaning.is_empty() && !v.set_by.is_empty()));
    }
}
