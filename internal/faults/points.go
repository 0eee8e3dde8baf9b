package faults

// Name is an instant in the life of a snapshot, between two steps that touch
// the disk. The text before the dot is the operation.
type Name string

// Points of Prepare and View, in order.
const (
	PrepareRenamed  Name = "prepare.renamed"  // snapshots/<id> exists, nothing is synced
	PrepareRecorded Name = "prepare.recorded" // its record is written and synced
	PrepareSynced   Name = "prepare.synced"   // directories are synced, no row yet
	PrepareDone     Name = "prepare.done"     // the row is durable, not answered yet
)

// Points of Apply and of the Commit that follows it, in order.
const (
	ApplyExtracted Name = "apply.extracted" // the tree is complete, in its place beside fs/
	ApplySealed    Name = "apply.sealed"    // marks are in order and the seal is written, nothing is synced
	ApplySynced    Name = "apply.synced"    // all of it is on disk, not answered yet
	CommitPlaced   Name = "commit.placed"   // the tree is fs/, in memory, and the record has the kind committed, on disk
)

// Points of Commit, in order.
const (
	CommitWalked   Name = "commit.walked"   // counted, nothing written
	CommitRecorded Name = "commit.recorded" // the record has the kind committed, nothing is synced
	CommitSynced   Name = "commit.synced"   // everything is on disk but the row
	CommitInTx     Name = "commit.in-tx"    // the transaction is filled, not committed
	CommitDone     Name = "commit.done"     // the row is durable, not answered yet
)

// Points of Remove and Cleanup, in order.
const (
	RemoveInTx     Name = "remove.in-tx"    // the transaction is filled, not committed
	RemoveDone     Name = "remove.done"     // the row is gone, the directory is there
	SweepSetAside  Name = "sweep.set-aside" // one directory moved to removing/
	SweepDeleting  Name = "sweep.deleting"  // directories moved, none deleted
	SweepDeleted   Name = "sweep.deleted"   // one tree deleted
	SnapshotUpdate Name = "update.in-tx"    // labels changed in the transaction only
)

// Points of birth and recovery, in order.
const (
	BirthWritten     Name = "birth.written"     // metadata.db.new is complete, under its temporary name
	BirthRenamed     Name = "birth.renamed"     // it has its name, the directory is not synced
	RecoverOpened    Name = "recover.opened"    // metadata.db is open and whole
	RecoverRecords   Name = "recover.records"   // records of active snapshots have the kind active again
	RecoverReplayed  Name = "recover.replayed"  // open extractions are closed
	RecoverSetAside  Name = "recover.set-aside" // orphans are in removing/, none deleted
	RecoverDone      Name = "recover.done"      // before the socket answers
	RewriteWritten   Name = "rewrite.written"   // after an I/O error: the copy of metadata.db is complete
	RewriteInstalled Name = "rewrite.installed" // and has its name
)

// Points of the healing of a damaged layer, in order.
const (
	HealExtracted  Name = "heal.extracted"  // the new tree is complete, beside the damaged one
	HealSynced     Name = "heal.synced"     // it is sealed and on disk
	HealJournalled Name = "heal.journalled" // the journal knows that they are going to change places
	HealExchanged  Name = "heal.exchanged"  // they have, in memory
	HealPlaced     Name = "heal.placed"     // and on disk
	HealDone       Name = "heal.done"       // the journal knows the new tree, the damaged one is still in healing/
)

// Healing lists the points of healing.
func Healing() []Name {
	return []Name{HealExtracted, HealSynced, HealJournalled, HealExchanged, HealPlaced, HealDone}
}

// Applying lists the points of Apply and of the Commit that follows it.
func Applying() []Name {
	return []Name{ApplyExtracted, ApplySealed, ApplySynced, CommitPlaced}
}

// All lists every point but those of healing and applying, for the tests that visit them one after another.
func All() []Name {
	return []Name{
		PrepareRenamed, PrepareRecorded, PrepareSynced, PrepareDone,
		CommitWalked, CommitRecorded, CommitSynced, CommitInTx, CommitDone,
		RemoveInTx, RemoveDone, SweepSetAside, SweepDeleting, SweepDeleted, SnapshotUpdate,
		BirthWritten, BirthRenamed,
		RecoverOpened, RecoverRecords, RecoverReplayed, RecoverSetAside, RecoverDone,
		RewriteWritten, RewriteInstalled,
	}
}
